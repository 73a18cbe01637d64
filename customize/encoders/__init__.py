"""Subject encoders: pictures of a subject to what is injected into the denoiser."""

from customize.encoders.encoded import Encoded
from customize.encoders.image_prompt import ImagePrompt
from customize.encoders.multimodal import MultimodalConfig, MultimodalEncoder
from customize.encoders.tower import ImageTower, load_tower

__all__ = ["Encoded", "ImagePrompt", "ImageTower", "MultimodalConfig", "MultimodalEncoder", "load_tower"]
