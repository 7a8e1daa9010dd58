"""Live: a page over a log that shows a training while it runs, and the same page as one file.

``feed`` follows the folder, ``view`` says what a page is told of it, ``percentiles`` reads its arrays, ``status``
tells how the training is, ``page`` is the HTML, ``guard`` lets in who was given the address, ``server`` serves.
Everything in a log is untrusted: it may come from another machine, be torn, be replaced, or be made to do harm.

Nothing here imports torch.
"""

from batchnorm.live.feed import Feed
from batchnorm.live.page import write
from batchnorm.live.server import serve

__all__ = ["Feed", "serve", "write"]
