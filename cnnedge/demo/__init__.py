"""A bundle as a web page: the model runs in the browser, and no image leaves it.

``runtime`` gets ONNX Runtime's WebAssembly files, ``site`` lays the page, the models and some
golden images into a folder that any file server can serve, ``serve`` serves it from here. The page
itself is in ``page/``: plain JavaScript modules, of which ``page/lib/`` is shared with Node.
"""

from cnnedge.demo.runtime import Runtime, find_runtime
from cnnedge.demo.serve import open_server
from cnnedge.demo.site import check_site_place, lay_site, page_variants

__all__ = [
    "Runtime",
    "check_site_place",
    "find_runtime",
    "lay_site",
    "open_server",
    "page_variants",
]
