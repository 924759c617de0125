"""Where the time of a run went, as a Markdown table, from the records of the last run: python infra/bench/time_by_stage.py"""

from collections import defaultdict

from flows import open_store
from flows.config import compose


def main() -> None:
    store = open_store(compose([]))
    records = [store.record(fingerprint) for fingerprint in store.aliases().values()]
    rows: dict[str, list[dict]] = defaultdict(list)
    for record in records:
        rows[record["stage"]].append(record)
    print("| stage | artifacts | threads | stage time (s) | core time (s) | share |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    total = sum(r["seconds"] * r["threads"] for r in records)
    for stage, made in sorted(rows.items(), key=lambda item: -sum(r["seconds"] * r["threads"] for r in item[1])):
        seconds, cores = sum(r["seconds"] for r in made), sum(r["seconds"] * r["threads"] for r in made)
        threads = "/".join(sorted({str(r["threads"]) for r in made}))
        print(f"| {stage} | {len(made)} | {threads} | {seconds:.1f} | {cores:.1f} | {100 * cores / total:.0f} % |")
    span = max(r["ended"] for r in records), min(r["started"] for r in records)
    print(f"\n{len(records)} artifacts, {total:.0f} core seconds; first start {span[1]}, last end {span[0]}")


if __name__ == "__main__":
    main()
