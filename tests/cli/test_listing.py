"""The list of methods: systems first, then the classics, in columns that agree."""

from stillhouse.cli.listing import show
from stillhouse.registry import entries


def test_classics_stand_together_below_the_systems(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    show(entries())
    systems, classics = capsys.readouterr().out.split("\nclassics, to compare with\n\n")
    head, *rows = systems.splitlines()
    assert head.split() == ["name", "family", "year", "arXiv", "what", "it", "is", "for"]
    found = {entry["name"]: entry for entry in entries()}
    assert [row.split()[0] for row in rows] == [name for name, entry in found.items() if not entry["classic"]]
    rows += classics.splitlines()
    assert [row.split()[0] for row in rows] == list(found)
    for row, entry in zip(rows, found.values(), strict=True):
        assert row[head.index("family") :].startswith(entry["family"])
        assert row[head.index("what") :] == entry["summary"]


def test_without_classics_there_is_no_heading_for_them(capsys):
    show([entry for entry in entries() if not entry["classic"]])
    assert "classics" not in capsys.readouterr().out
