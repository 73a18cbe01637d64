"""For `DiffusionPipeline.from_pretrained(base, custom_pipeline="examples/custom_pipeline/sd",
trust_remote_code=True)`.

Then `pipe.load_subject_adapter("runs/encoder")`, and `pipe("a photo of a <s> dog",
subject_images=["dog.png"])`.
"""

from customize.pipelines import subject


class SubjectPipeline(subject.SubjectSDPipeline):
    """Stable Diffusion 1.x and 2.x with subjects."""
