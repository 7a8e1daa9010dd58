"""Live: a page that shows a training from its log while it runs, and the same page as one file.

``log_feed`` follows the folder, ``page_data`` selects a page's data, ``percentiles`` reads its arrays, ``run_status``
tells whether the training runs, ``page`` is the HTML, ``access`` checks who may read it, ``server`` serves it.
Everything in a log is untrusted: it may come from another machine, be torn, be replaced, or be malicious.

Nothing here imports torch.
"""

from batchnorm.live.log_feed import Feed
from batchnorm.live.page import write
from batchnorm.live.server import serve

__all__ = ["Feed", "serve", "write"]
