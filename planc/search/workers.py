from contextlib import contextmanager

from planc.search.evaluate import Evaluator


@contextmanager
def evaluating(spec, *, workers=1, dask=None, fits=(), ttft=False, say=None):
    evs = {}

    def evaluate(asked, whole=False):
        ev = evs.setdefault(0, Evaluator(spec))
        return [ev.outcome(*a, ttft=ttft, whole=whole) for a in asked]

    yield evaluate
