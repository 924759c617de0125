"""What the last run's report claims, as Markdown: each model's scores, and each claim with its interval.

    cuvee run scale=h100x1_show cluster=h100x1 cluster.concurrent_stages=8 && python infra/bench/claims.py
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from flows import open_store
from flows.config import compose


def main() -> None:
    store = open_store(compose([]))
    made = store.aliases()
    record = store.record(made["report"])
    found = json.loads((store.fetch(made["report"]) / "matrix.json").read_text())
    records = [store.record(fingerprint) for fingerprint in made.values()]
    began, ended = min(r["started"] for r in records), max(r["ended"] for r in records)
    print(f"{len(records)} artifacts from {began} to {ended}; commit {record['environment']['commit']}\n")
    print(f"| score (%) | {' | '.join(found['domains'])} | mean |\n|---|{'---:|' * (len(found['domains']) + 1)}")
    for name, row in found["models"].items():
        means = [100 * row["domains"][domain]["value"] for domain in found["domains"]]
        print(f"| {name} | {' | '.join(f'{mean:.1f}' for mean in means)} | {sum(means) / len(means):.1f} |")
    print("\n| claim | on | measure | prompts | seed | value | 95 % | shown |\n|---|---|---|---:|---:|---:|---:|---|")
    for one in found["claims"]:
        print(f"| {one['claim']} | {one['on']} | {one['measure']} | {one['prompts']} | {one['seed']} | {one['value']:+.3f} "
              f"| {one['low']:+.3f} ... {one['high']:+.3f} | {'yes' if one['shown'] else 'no'} |")  # fmt: skip


if __name__ == "__main__":
    main()
