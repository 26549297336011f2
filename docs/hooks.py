"""What mkdocs.yml cannot say."""

from __future__ import annotations

from pathlib import Path

from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import SimpleTextInlineProcessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


class Formulas(Extension):
    """Leaves `d_ij - (m - d_iy)_+` and `<x_i, w_j>` in docstrings alone: no emphasis by underscores, and no
    inline HTML."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.inlinePatterns.register(SimpleTextInlineProcessor("(_+)"), "underscores", 61)  # emphasis has 60
        md.inlinePatterns.deregister("html")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.markdown_extensions.append(Formulas())
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Pictures of benchmarks/results are part of the site, under results/."""
    for picture in sorted(RESULTS.rglob("*.png")):
        where = f"results/{picture.relative_to(RESULTS).as_posix()}"
        files.append(File.generated(config, where, abs_src_path=str(picture)))
    return files
