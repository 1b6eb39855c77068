"""Reads a page as a browser would, and notes what it refers to."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """What a page holds: texts by class, images, and all that it refers to."""

    VOID = ("meta", "img", "br", "wbr")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.texts: list[tuple[str, str]] = []  # (class, text)
        self.titles: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.add(tag)
        self.references += [found[name] for name in ("src", "href", "srcset", "data", "action") if name in found]
        self.titles += [found["title"]] if "title" in found else []
        if tag not in self.VOID:
            self.open.append((tag, found.get("class", "")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and data.strip():
            self.texts.append((self.open[-1][1] or self.open[-1][0], data))

    def of(self, kind: str) -> list[str]:
        return [text for name, text in self.texts if name == kind]
