"""Which messages of the libraries reach the screen."""

from collections.abc import Iterator
from contextlib import contextmanager


def quiet_libraries() -> None:
    """Leaves the screen to our own messages; downloads keep their progress bars."""
    import diffusers.utils.logging
    import huggingface_hub.utils
    import transformers.utils.logging

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()


@contextmanager
def quietly() -> Iterator[None]:
    """Context in which diffusers and transformers print errors only, and show progress bars for downloads
    only."""
    import diffusers.utils.logging
    import huggingface_hub.utils
    import transformers.utils.logging

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [(logging.get_verbosity(), logging.is_progress_bar_enabled()) for logging in libraries]
    quiet_libraries()
    try:
        yield
    finally:
        for logging, (verbosity, bars) in zip(libraries, before, strict=True):
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
        huggingface_hub.utils.enable_progress_bars()
