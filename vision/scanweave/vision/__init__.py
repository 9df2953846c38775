"""Vision backbones on scanweave's mixers. Importing this package registers them with timm.

timm has no plug-in hook: import `scanweave.vision` before `timm.create_model("vim_...")`.
"""

try:
    import timm  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "timm":
        raise
    raise ImportError("scanweave.vision needs timm: pip install 'scanweave[vision]'") from error

from .hydra_vit import HydraVit
from .ssm_vit import SsmVit
from .vim import Vim
from .vmamba import VMamba

__all__ = ["HydraVit", "SsmVit", "VMamba", "Vim"]
