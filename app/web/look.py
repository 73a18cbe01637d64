"""How the page looks: colours, type and spacing, light and dark."""

import gradio as gr

HEAD = '<meta name="viewport" content="width=device-width, initial-scale=1">'

CSS = """
.gradio-container, .gradio-container > main { width: 100% !important; }
.gradio-container > main { max-width: 1280px !important; margin: 0 auto !important; }
#top { padding-top: 0.4rem; }
#top h1 { font-weight: 700; letter-spacing: -0.03em; margin: 0; }
#top p { margin: 0.1rem 0 0.2rem; color: var(--body-text-color-subdued); }
.bar { height: 8px; border-radius: 4px; background: var(--border-color-primary); overflow: hidden; }
.bar > div { height: 100%; border-radius: 4px; background: var(--color-accent); transition: width 0.4s; }
.note p, .note li { font-size: 0.92rem; color: var(--body-text-color-subdued); }
.examples { gap: 0.4rem !important; flex-wrap: wrap; }
.examples button { flex: 0 1 auto !important; min-width: 0 !important; border-radius: 999px;
  font-weight: 400; }
button:focus-visible, input:focus-visible, textarea:focus-visible, [role="tab"]:focus-visible {
  outline: 2px solid var(--color-accent); outline-offset: 2px; }
footer .divider { display: none !important; }
"""


def theme() -> gr.Theme:
    """The page's theme; fonts of the system alone, so that nothing is loaded from elsewhere."""
    sans = ["Inter", "ui-sans-serif", "system-ui", "sans-serif"]
    mono = ["ui-monospace", "Consolas", "monospace"]
    made = gr.themes.Default(
        primary_hue="orange", secondary_hue="teal", neutral_hue="stone", font=sans, font_mono=mono
    )
    labels = {
        f"block_{part}_{name}{dark}": value
        for dark in ("", "_dark")
        for part in ("title", "label")
        for name, value in {
            "background_fill": "*block_background_fill",
            "text_color": f"*neutral_{200 if dark else 700}",
            "border_width": "0px",
        }.items()
    }
    return made.set(
        body_background_fill="*neutral_100",
        block_background_fill="white",
        block_border_width="1px",
        block_shadow="0 1px 2px rgb(0 0 0 / 0.04)",
        block_radius="12px",
        button_large_radius="10px",
        button_small_radius="8px",
        input_radius="8px",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_text_color="white",
        block_title_text_weight="600",
        block_label_text_weight="600",
        **labels,
    )
