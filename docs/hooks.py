"""What mkdocs.yml cannot say: pictures of benchmarks/results are part of the site, under results/."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for picture in sorted(RESULTS.rglob("*.png")):
        where = f"results/{picture.relative_to(RESULTS).as_posix()}"
        files.append(File.generated(config, where, abs_src_path=str(picture)))
    return files
