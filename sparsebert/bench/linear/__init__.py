"""One linear layer, y = x Wᵀ + b, by every kernel there is for it: the shapes, the peers and the order of the work.

``cases`` says what a measurement is made of; ``dense``, ``library`` and ``own`` are the peers; ``sweep`` measures them;
``ceilings`` what the machine can do at best; ``never_slower`` what ``sb.tune`` chose. Nothing is imported here.
"""
