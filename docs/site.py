"""Hooks of the site: the API reference from the public names, and what the pages link to outside of docs/ as pages."""

import re
from pathlib import Path
from posixpath import normpath, relpath
from typing import Any

from mkdocs.structure.files import File, Files

import synchromesh

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")
LANGUAGES = {".py": "python", ".jsonl": "json", ".json": "json", ".toml": "toml", "": "text"}


def on_files(files: Files, config: Any) -> Files:
    """Add pages for public names, and for each file outside of docs/ that a page links to."""
    for module, names in synchromesh._HOMES.items():
        text = "\n".join([f"# synchromesh.{module}\n", *dict.fromkeys(f"::: {_home(name)}\n" for name in names)])
        files.append(File.generated(config, f"reference/{module}.md", content=text))
    for page in list(files.documentation_pages()):
        if page.src_uri.endswith(".md") and not page.generated_by:
            for target in {_outside(found[1], page.src_uri) for found in OUTSIDE.finditer(page.content_string)} - {
                None
            }:
                if files.get_file_from_path(_place(target)) is None:
                    files.append(File.generated(config, _place(target), content=_shown(target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let links that leave docs/ lead to the page made of the file."""
    here = Path(page.file.src_uri).parent.as_posix()

    def there(found: re.Match[str]) -> str:
        target = _outside(found[1], page.file.src_uri)
        return found[0] if target is None else f"]({relpath(_place(target), here)}{found[2] or ''})"

    return OUTSIDE.sub(there, markdown)


def _home(name: str) -> str:
    """Return where a public name is defined, which is not always where it is taken from."""
    public = getattr(synchromesh, name)
    return f"{public.__module__}.{getattr(public, '__qualname__', name)}"


def _outside(link: str, page: str) -> str | None:
    """Return the path of a link from the root of the repository, where it leads out of docs/."""
    path = normpath(f"docs/{Path(page).parent.as_posix()}/{link}")
    return None if path.startswith("docs/") else path


def _place(target: str) -> str:
    return f"files/{target}" if target.endswith(".md") else f"files/{target}.md"


def _shown(target: str) -> str:
    text = (ROOT / target).read_text()
    if target.endswith(".md"):  # its own links start at the root
        return re.sub(r"\]\(docs/", "](../", re.sub(r"\]\((?!docs/|https?:)([^)#]+)\)", r"](../../\1)", text))
    return f"# {target}\n\n````{LANGUAGES[Path(target).suffix]}\n{text}\n````\n"
