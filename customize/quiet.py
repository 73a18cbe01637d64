"""Which messages of the libraries reach the screen."""

from collections.abc import Iterator
from contextlib import contextmanager


def quiet_libraries() -> None:
    """Leaves the screen to our own messages; downloads keep their progress bars."""
    import diffusers.utils.logging
    import huggingface_hub.utils
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()


@contextmanager
def quietly() -> Iterator[None]:
    """Context in which diffusers and transformers print errors only, and show progress bars for downloads
    only."""
    import diffusers.utils.logging
    import huggingface_hub.utils
    import transformers.utils.logging

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    quiet_libraries()
    try:
        yield
    finally:
        for library, (verbosity, bars) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()
        huggingface_hub.utils.enable_progress_bars()
