"""Live: a page that shows a training from its log while it runs, and the same page as one file.

``log_feed`` follows the folder, ``page_data`` selects a page's data, ``percentiles`` reads the arrays of a layer,
``run_status`` reports whether the training runs, ``page`` writes the HTML, ``access`` checks who may read the page,
``server`` serves it. A log is untrusted: it may come from another machine, be incomplete, be replaced, or be malicious.

Nothing here imports torch.
"""

from batchnorm.live.log_feed import Feed
from batchnorm.live.page import write
from batchnorm.live.server import serve

__all__ = ["Feed", "serve", "write"]
