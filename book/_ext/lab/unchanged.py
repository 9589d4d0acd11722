"""A chapter written anew, with the old text of every cell that is the same."""

import difflib
import json

from jupytext.myst import myst_to_notebook


def segments(text):
    """(what stands above the first cell, [(cell as JSON, its lines)]) of a chapter."""
    lines = text.splitlines(keepends=True)
    nb = myst_to_notebook(text, add_source_map=True)
    cells, code = nb.cells, [cell.cell_type == "code" for cell in nb.cells]
    starts = [at - fence for at, fence in zip(nb.metadata["source_map"], code)]
    starts = [at - (at > 0 and lines[at - 1].startswith("+++")) for at in starts]
    parts = zip(starts, [*starts[1:], len(lines)])
    texts = ["".join(lines[start:stop]).strip("\n") for start, stop in parts]
    return "".join(lines[: starts[0]]).strip("\n"), [
        (json.dumps([c.cell_type, c.metadata, c.source], sort_keys=True), t)
        for c, t in zip(cells, texts)
    ]


def merged(old, new):
    """The text of a cell that stands for an old one: as it was, but for its source."""
    (was, text), (now, written) = old, new
    if was == now:
        # a cell of text needs a break before it where another one went between
        return written if written[:3] == "+++" != text[:3] else text
    (kind, metadata, source), (*same, changed) = json.loads(was), json.loads(now)
    if kind == "code" and same == [kind, metadata] and text.count(source) == 1:
        return text.replace(source, changed)
    return written


def keep(before, after):
    """The chapter as written anew, with the old text of all cells that are the same."""
    (head, old), (_, new) = segments(before), segments(after)
    matcher = difflib.SequenceMatcher(
        None, [cell for cell, _ in old], [cell for cell, _ in new], autojunk=False
    )
    out = [head]
    for kind, a, b, c, d in matcher.get_opcodes():
        paired = b - a == d - c
        for i, cell in enumerate(new[c:d]):
            out.append(merged(old[a + i], cell) if paired else cell[1])
    return "\n\n".join(out) + "\n"
