"""The gallery of all tutorials: their order, and what a card says."""

import re
from html import escape, unescape
from pathlib import Path

from pages import GALLERY

ORDER = {}  # conf.py's tutorial_order


class LearnersOrder:
    """Sort the tutorials of a room as conf.py lists them, and the others after them."""

    def __init__(self, src_dir):
        self.listed = ORDER.get(Path(src_dir).name, [])

    def __call__(self, filename):
        name = Path(filename).stem
        listed = self.listed
        return listed.index(name) if name in listed else len(listed), name


def name_rooms(text):
    """Give each room's part of the menu its title as a caption."""
    rooms = re.split(r"^(?=.+\n-{3,}$)", text, flags=re.MULTILINE)
    titles = ["Start", *(room.partition("\n")[0] for room in rooms[1:])]
    hidden = ".. toctree::\n   :hidden:\n"
    return "".join(
        room.replace(hidden, f"{hidden}   :caption: {title}\n")
        for title, room in zip(titles, rooms)
    )


def show_first_sentence(text):
    """Replace the tooltip of each card by its first sentence, for all to see."""

    def card(found):
        tooltip, between, title = found.groups()
        sentence = re.match(r".*?[.!?:](?= |$)|.*", unescape(tooltip))[0]
        sentence = re.sub("(.*):$", r"\1.", sentence)
        said = f'<div class="card-text">{escape(sentence)}</div>'
        return f"{between}{title}\n      {said}"

    pattern = (
        r' tooltip="([^"]*)"(>.*?)(<div class="sphx-glr-thumbnail-title">.*?</div>)'
    )
    return re.sub(pattern, card, text, flags=re.DOTALL)


def arrange(app, path, docname, content):
    if path.as_posix().endswith(f"{GALLERY}index.rst"):
        content[0] = show_first_sentence(name_rooms(content[0]))


def take_order(app, config):
    ORDER.update(config.tutorial_order)


def setup(app):
    app.add_config_value("tutorial_order", {}, "env", dict)
    app.connect("config-inited", take_order)
    app.connect("include-read", arrange)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
