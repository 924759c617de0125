"""A corpus by a judge's taste: a first curation, an LLM's grades of a sample, and a second one whose classifier learned them.

`cuvee run recipe=curation +data=judged data.sources=[...] judge.teacher='{model: own, url: "http://127.0.0.1:8000/v1"}'`
"""

from __future__ import annotations

from flows._parts import having


def recipe(step, conf) -> None:
    plain = having(conf.data, blocks=[name for name in conf.data.blocks if name != "classifier"])
    first = step("first", "data.curate", plain)
    labels = step("labels", "data.judge", conf.judge, corpus=first)
    step("corpus", "data.curate", conf.data, labels=labels)
