"""A person as the judge (--judge human): one of preference.py's voices, in the terminal."""
import re
import shutil
import textwrap
from itertools import zip_longest


def by_hand(todo, system, labels):
    """Two transcripts side by side in the terminal. To quit, or to lose the terminal, is Ctrl-C: train.py can go on."""
    for key, (prompt, _) in todo.items():
        task, *two = re.split("\nTRAJECTORY [AB]\n", prompt)  # what is judged is quoted, so it has no such line
        width = shutil.get_terminal_size().columns // 2 - 2
        left, right = (sum((textwrap.wrap(line, width) for line in text.split("\n")), []) for text in two)
        print("\n" + task, f"{'TRAJECTORY A':<{width}}  TRAJECTORY B", sep="\n")
        print("\n".join(f"{a:<{width}}  {b}" for a, b in zip_longest(left, right, fillvalue="")))
        keys = {"l": "A", "r": "B", "t": "tie", "s": None}
        try:
            while (said := input("better: l left, r right, t tie; s skip, q quit > ").strip().lower()) not in keys:
                if said == "q":
                    raise EOFError
        except (EOFError, OSError, ValueError, RuntimeError):  # what input() raises without a terminal
            raise KeyboardInterrupt("the person left; what was judged is kept") from None
        yield key, keys[said]
