"""From the rows of runs to tables, plots and the table that selection ships with. Pure functions: what they give
depends on the rows alone.

``compare`` says what is held against what, ``tables`` and ``plots`` show it, ``page`` puts both under the name of the
device they are of, ``summary`` is the one page of a GPU check, ``choices`` what selection may use. Nothing is imported
here.
"""
