"""What the libraries say, and what of it reaches the screen."""


def quiet_libraries() -> None:
    """Leaves the screen to our own messages; downloads keep their progress bars."""
    import diffusers.utils.logging
    import huggingface_hub.utils
    import transformers.utils.logging

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()
