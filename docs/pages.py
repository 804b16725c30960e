"""A hook of mkdocs: pages of the site that live elsewhere in the repository, and links as a browser of the repository sees them.

README.md is the site's first page. Links are written so that they work where the files are; here they are turned into links
between pages. What is in the repository and not on the site, such as a source file, keeps its name and loses its link.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "csrc/README.md": "kernels.md",
    "benchmarks/README.md": "benchmarks-readme.md",
}
FENCED = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
# GitHub begins a list or a table right under a line of text, and a table under a comment; Markdown in Python wants a blank line.
UNDER_TEXT = re.compile(r"^((?![ \-*|#>]|\d+\. ).*\S.*\n)(?=(?:- |\d+\. |\|))", re.MULTILINE)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that live outside of docs/."""
    for source, name in PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links between files of the repository into links between pages."""
    name = page.file.src_uri
    source = next((source for source, as_page in PAGES.items() if as_page == name), f"docs/{name}")

    def turn(link: re.Match[str]) -> str:
        image, text, target = link.groups()
        path, hash_, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", target):
            return link[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        to = PAGES.get(file, file.removeprefix("docs/") if file.startswith("docs/") else None)
        if to is None or (ROOT / file).is_dir():
            return text
        return f"{image}[{text}]({posixpath.relpath(to, posixpath.dirname(name) or '.')}{hash_}{anchor})"

    parts = FENCED.split(LINK.sub(turn, markdown))  # every other one is fenced
    parts[::2] = [UNDER_TEXT.sub(r"\1\n", part) for part in parts[::2]]
    return "".join(parts)
