"""Puts the committed figures and tables of benchmarks/results among the built pages."""

from pathlib import Path

from mkdocs.structure.files import File

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def on_files(files, config):
    """Adds every result as results/<name>, where the pages link to it."""
    for result in sorted(RESULTS.iterdir()):
        found = File.generated(config, f"results/{result.name}", abs_src_path=str(result))
        files.append(found)
    return files
