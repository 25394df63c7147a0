"""Widgets for notebooks: layout only. Each button calls a function that works without a screen too.

label(rows, annotator="anna", path="labels/")      a rlnb.data.labelling.Session on the screen
panel("dpo")                                       knobs, forecast, live curve and table of a method
"""

from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlnb.data import labelling

if TYPE_CHECKING:
    from rlnb.show.panel import Panel

KEYS = {"l": "left", "r": "right", "t": "tie", "s": "skip", "u": "undo"}
LINE = "1px solid var(--jp-border-color1, #bdbdbd)"  # JupyterLab's colour, or one for Colab
TEXT = "white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5;"


def label(
    rows: Iterable[dict[str, Any]], *, annotator: str, path: str | Path, **options: Any
) -> "LabelView":
    """Label responses by hand: leave it as the last line of a cell. options: as for ``Session``.

    Its ``session`` has the answers; running the cell again goes on where the last one stopped.
    """
    return LabelView(labelling.Session(rows, annotator, path, **options))


def panel(method: str, **options: Any) -> "Panel":
    """The training panel of a method: leave it as the last line of a cell. options: as for ``Panel``."""
    from rlnb.show.panel import Panel

    return Panel(method, **options)


class LabelView:
    """A session on the screen: prompt, a card for each response, buttons, keys, progress."""

    def __init__(self, session: labelling.Session) -> None:
        import ipywidgets

        self.session = session
        self.prompt, self.status, self.message = (ipywidgets.HTML() for _ in range(3))
        wide = dict(flex="1 1 15rem", min_width="0", margin="4px", padding="0.5rem", border=LINE)
        self.cards = [ipywidgets.HTML(layout=wide) for _ in range(session.k)]
        self.buttons = {name: self._button(name) for name in self._names()}
        self.keys = ipywidgets.Text(
            placeholder=f"or click here and type {self._hint()}",
            layout=ipywidgets.Layout(flex="1 1 16rem", max_width="26rem"),
        )
        self.keys.observe(self._on_key, "value")
        self.bar = ipywidgets.IntProgress(
            max=len(session.items), layout=ipywidgets.Layout(width="99%", height="0.6rem")
        )
        wrap = ipywidgets.Layout(flex_flow="row wrap", align_items="stretch")
        self.box = ipywidgets.VBox(
            [
                self.prompt,
                ipywidgets.Box(self.cards, layout=wrap),
                ipywidgets.Box([*self.buttons.values(), self.keys], layout=wrap),
                self.bar,
                self.status,
                self.message,
            ],
            layout=ipywidgets.Layout(max_width="72rem"),
        )
        self.refresh()

    def act(self, what: str) -> None:
        """Answer, or "undo", and show what comes next. What goes wrong is shown, not raised."""
        said = ""
        try:
            self.session.undo() if what == "undo" else self.session.choose(what)
        except (OSError, ValueError) as error:
            said = str(error)
        self.refresh(said)

    def refresh(self, said: str = "") -> None:
        """Show the session as it is, with a message below."""
        session, item = self.session, self.session.current
        shown = item.shown if item else []
        self.prompt.value = _messages(item.row["prompt"]) if item else _block("All answered.", "")
        for i, card in enumerate(self.cards):
            card.layout.display = "block" if i < len(shown) else "none"
            card.value = _card(self._sides()[i], shown[i]) if i < len(shown) else ""
        takes = session.choices(item) if item else ()
        for name, button in self.buttons.items():
            button.disabled = not session.labels if name == "undo" else name not in takes
        self.bar.value = len(session.labels)
        self.status.value = _block(str(session), "color: var(--jp-ui-font-color2, #616161);")
        self.message.value = _block(said, "color: var(--jp-error-color1, #c62828);") if said else ""

    def _names(self) -> tuple[str, ...]:
        """The answers in the order of their buttons; the cards have those of `_sides`."""
        left, *rest = self._sides()
        middle = ("tie", *rest) if self.session.k == 2 else (*rest, "tie")
        return (left, *middle, "skip", "undo")

    def _sides(self) -> tuple[str, ...]:
        places = tuple(str(i + 1) for i in range(self.session.k))
        return labelling.SIDES if self.session.k == 2 else places

    def _hint(self) -> str:
        letters = [name if name.isdigit() else name[0] for name in self._names()]
        return ", ".join(letters[:-1]) + f" or {letters[-1]}"

    def _button(self, name: str) -> Any:
        import ipywidgets

        key = name if name.isdigit() else name[0]
        button = ipywidgets.Button(
            description=name.title(),
            tooltip=f"{name} (key {key})",
            button_style="primary" if name in self._sides() else "",
            layout=ipywidgets.Layout(width="6rem"),
        )
        button.on_click(lambda _: self.act(name))
        return button

    def _on_key(self, change: dict[str, Any]) -> None:
        """One letter in the text field is one answer. Several at once came before the screen showed
        what they answer, so they count as none.
        """
        typed = change["new"].strip().lower()
        if not change["new"]:
            return
        name = typed if typed.isdigit() else KEYS.get(typed, typed)
        if name in self.buttons:
            self.act(name)
        else:
            self.refresh(f"{typed[:20]!r} is no answer: type one letter at a time, {self._hint()}")
        self.keys.value = ""

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return self.box._repr_mimebundle_(**kwargs)


def _card(title: str, text: str) -> str:
    head = f"<div style='font-weight: 600; margin-bottom: 0.3rem;'>{escape(title.title())}</div>"
    mono = "font-family: var(--jp-code-font-family, monospace); max-height: 24rem; overflow: auto;"
    return f"{head}<div style='{TEXT} {mono}'>{escape(text)}</div>"


def _messages(messages: list[dict[str, str]]) -> str:
    """The prompt; roles are named where there is more than one message."""
    parts = [
        f"<b>{escape(message['role'])}</b> {escape(message['content'])}"
        if len(messages) > 1
        else escape(message["content"])
        for message in messages
    ]
    style = "font-size: 1.05em; max-height: 20rem; overflow: auto; padding: 0.4rem 4px;"
    return f"<div style='{TEXT} {style}'>" + "<br>".join(parts) + "</div>"


def _block(text: str, style: str) -> str:
    return f"<div style='{TEXT} padding: 0 4px; {style}'>{escape(text)}</div>"
