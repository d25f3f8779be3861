"""The acceptance run on a GPU: builds, checks, tests and times the package, all by one command.

    python3 -m bench.gpu --budget 540

``__main__.py`` shares the time among the parts of a run. Each is a process that may fail, hang or be ended without harm
to the others: pytest, with ``outcomes.py`` as a plugin, for the tests that are marked gpu, and ``rows.py``, which times
what ``providers.py`` lists. Both append what they find to one file, line by line (``record.py``), from which
``report.py`` makes the document. ``compare.py`` times two builds of the package.
"""
