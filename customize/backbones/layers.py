"""Layers that LoRA is added to, by the ends of their names in diffusers' models."""

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
FEED_FORWARD = [
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
    "proj_mlp",
    "proj_out",
]
CONVOLUTIONS = [
    "conv1",
    "conv2",
    "conv_shortcut",
    "time_emb_proj",
    "proj_in",
]  # of a UNet's residual and transformer blocks
PRESETS = {
    "attention": ATTENTION,
    "attention+ff": ATTENTION + FEED_FORWARD,
    "all": ATTENTION + FEED_FORWARD + CONVOLUTIONS,
}
