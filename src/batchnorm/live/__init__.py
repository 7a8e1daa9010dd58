"""Live: a page over a log that shows a training while it runs, and the same page as one file.

``log_feed`` follows the folder, ``page_data`` says what a page is told of it, ``percentiles`` reads its arrays,
``run_status`` tells how the training is, ``page`` is the HTML, ``access`` lets in who was given the address, ``server``
serves. Everything in a log is untrusted: it may come from another machine, be torn, be replaced, or be made to do harm.

Nothing here imports torch.
"""

from batchnorm.live.log_feed import Feed
from batchnorm.live.page import write
from batchnorm.live.server import serve

__all__ = ["Feed", "serve", "write"]
