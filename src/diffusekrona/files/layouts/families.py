"""The layouts of all families."""

from torch import nn

from .anima import ANIMA_TEXT
from .chroma import CHROMA
from .cosmos import COSMOS
from .flux import FLUX
from .flux2 import FLUX2
from .hidream import HIDREAM
from .hunyuan_video import HUNYUAN_VIDEO
from .krea2 import KREA2
from .layout import Layout
from .lumina2 import LUMINA2
from .pixart import PIXART
from .qwen_image import QWEN_IMAGE
from .sana import SANA
from .sd3 import SD3
from .wan import WAN
from .zimage import ZIMAGE

LAYOUTS: tuple[Layout, ...] = (
    SD3,
    FLUX,
    CHROMA,
    FLUX2,
    ZIMAGE,
    QWEN_IMAGE,
    KREA2,
    HIDREAM,
    LUMINA2,
    PIXART,
    SANA,
    COSMOS,
    ANIMA_TEXT,
    WAN,
    HUNYUAN_VIDEO,
)


def layout_of(model: nn.Module) -> Layout | None:
    """The layout of a model's family, by its class and those it derives from; None if they are of no known one."""
    names = [kind.__name__ for kind in type(model).__mro__]
    return next((layout for name in names for layout in LAYOUTS if name in layout.models), None)
