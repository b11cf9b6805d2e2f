"""Figures of graftkit next to a peer's, taken in turns; the table of their ratios, and the file that keeps it.

``python -m benchmarks`` measures everything, ``python -m benchmarks plan,survey`` two of them; with ``--quick``
small sizes, which are printed and not kept.

**Adding a row.** Write a file in ``benchmarks/`` with a function ``contests(setting)`` that yields contests; the
folder is listed, no table names it. A contest has sides that take turns, and rows that compare two of them::

    def contests(setting: Setting) -> Iterator[Contest]:
        with tempfile.TemporaryDirectory(dir=setting.folder) as name:
            folder = Path(name)
            size = write_base(folder / "base", setting.of(quick=50_000_000, full=4_000_000_000))
            sides = {
                "graftkit": lambda: cold(GRAFT, "merge", folder / "base", ...).figures,
                "cp + sync": lambda: cold("sh", "-c", "cp ... && sync ...").figures,
            }
            yield Contest(
                size=f"{size / 1e9:.1f} GB",
                rows=(Row("merge, verified", "cp + sync", Figure.SECONDS, aim=1.6),),
                turns=in_turns(sides, after=lambda: shutil.rmtree(folder / "out")),
            )

- A side returns its figures: a value for each :class:`Figure` that a row compares. ``cold`` runs a command as a
  new process and gives ``SECONDS``, ``CPU`` and ``PEAK`` of it and its children; ``told`` reads further ones
  from the JSON on the last line that the command prints.
- A row's ratio is graftkit's figure divided by its peer's in the same turn. ``aim`` is the most it should be, or
  the least where more is better; ``Row(..., ours="graft merge --no-verify")`` names another side than
  "graftkit".
- ``in_turns`` runs the sides in the order given, again and again, after one round that is not counted. A contest
  whose turns lie within one process (``benchmarks/guard.py``) gives its own function instead.
- Everything heavy is imported inside functions: the list of benchmarks is read before one is chosen.
- What this machine cannot measure is a :class:`Gap`, yielded like a contest: the table says "not measured", and
  why.
- ``size`` is part of a row's identity: ratios of different sizes are never compared.
"""
