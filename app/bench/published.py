"""Published DreamBench numbers. They are not one protocol: reference choice, images a prompt and re-runs
differ by paper."""

PAPER = "30 subjects, 25 prompts, 4 images, against all real images"
ROWS = [
    ("Real images", 0.774, 0.885, None, f"DreamBooth paper: {PAPER}"),
    ("Textual Inversion, SD", 0.569, 0.780, 0.255, f"DreamBooth paper: {PAPER}"),
    ("DreamBooth, SD", 0.668, 0.803, 0.305, f"DreamBooth paper: {PAPER}"),
    ("DreamBooth, Imagen", 0.696, 0.812, 0.306, f"DreamBooth paper: {PAPER}"),
    ("Custom Diffusion", 0.643, 0.790, 0.305, "printed in the lambda-ECLIPSE paper"),
    ("HiFi-Tuner", 0.680, 0.809, 0.317, "printed in its own paper"),
    (
        "BLIP-Diffusion, no tuning",
        0.594,
        0.779,
        0.300,
        "printed in the Emu2 paper; lambda-ECLIPSE's re-run .603 .793 .291",
    ),
    ("BLIP-Diffusion, tuned", 0.670, 0.805, 0.302, "printed in the Emu2 paper"),
    ("ELITE", 0.647, 0.772, 0.296, "printed in the USO paper; lambda-ECLIPSE has .621 .771 .293"),
    ("IP-Adapter, SD 1.5", 0.629, 0.827, 0.264, "re-run of the lambda-ECLIPSE paper"),
    ("IP-Adapter, SDXL", 0.613, 0.810, 0.292, "re-run of the lambda-ECLIPSE paper"),
    ("SSR-Encoder", 0.612, 0.821, 0.308, "printed in the USO paper"),
    ("lambda-ECLIPSE", 0.613, 0.783, 0.307, "printed in its own paper"),
    ("MS-Diffusion, SDXL", 0.671, 0.792, 0.321, "printed in the SFO paper"),
    ("JeDi, SD 1.4", 0.679, 0.814, 0.293, "printed in the SFO paper"),
    ("OmniGen", 0.693, 0.801, 0.315, "printed in the USO paper"),
    ("OminiControl", 0.684, 0.799, 0.312, "printed in the USO paper; SFO's re-training .652 .795 .329"),
    ("UNO", 0.760, 0.835, 0.304, "printed in the USO paper: 6 images a prompt"),
    ("FLUX Kontext", 0.762, 0.833, 0.321, "printed in the SFO paper"),
    ("USO", 0.777, 0.838, 0.317, "printed in its own paper"),
]
PUBLISHED = [
    {"label": label, "scores": {"dino": dino, "clip_i": clip_i, "clip_t": clip_t}, "protocol": protocol}
    for label, dino, clip_i, clip_t, protocol in ROWS
]
