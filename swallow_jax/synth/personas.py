"""Who speaks: the personas a plan draws from, out of the task or out of a Parquet file (Nemotron-Personas-Japan and its kind)."""

from pathlib import Path

from swallow_jax.synth import plan
from swallow_jax.task import Task

_MOST = 20_000  # of a file with a million rows; drawn evenly, so that no region or age that stands first prevails


def load(task: Task, given: str | None, *, seed: int) -> tuple[str, ...]:
    """`given` is FILE.parquet:COLUMN or None for the task's own; () where there are none.

    Raises ValueError naming file and column for what is no Parquet file, has no such column, or holds no text in it.
    """
    if given is None and task.personas.path is None:
        return task.personas.texts
    if given is None:
        path, column = task.personas.path, task.personas.column
    else:
        name, _, column = given.rpartition(":")
        path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"personas: {path} does not exist; give FILE.parquet:COLUMN")
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise ValueError("personas from a Parquet file need pyarrow: pip install 'swallow_jax[data]'") from error
    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"personas: {path} is no Parquet file ({error}); give FILE.parquet:COLUMN") from None
    if column not in file.schema_arrow.names:
        raise ValueError(f"personas: {path} has no column {column!r}; it has: {', '.join(file.schema_arrow.names)}")
    rows = file.metadata.num_rows
    step = max(1, rows // _MOST)
    first, found = plan.draw(f"{seed}/personas") % step, []
    at = 0
    for batch in file.iter_batches(columns=[column]):
        start = (first - at) % step
        found += [value for value in batch.column(0)[start::step].to_pylist() if isinstance(value, str) and value.strip()]
        at += batch.num_rows
    if not found:
        raise ValueError(f"personas: column {column!r} of {path} holds no text")
    return tuple(" ".join(text.split()) for text in found)
