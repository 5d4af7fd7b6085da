"""Lightning callbacks; imported as `compressor.callbacks`."""

from compressor.callbacks.progress import Progress
from compressor.callbacks.recovery import Recovering
from compressor.callbacks.scoring import HeadScoring

__all__ = ["HeadScoring", "Progress", "Recovering"]
