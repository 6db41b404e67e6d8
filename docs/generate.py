"""Write docs/reference/ from the code; with --check, say whether it has fallen behind."""

import sys
from pathlib import Path

from prometheus_client.metrics import MetricWrapperBase
from pydantic_core import PydanticUndefined

from headway import errors, metrics, states
from headway.settings import Settings, variable

HERE = Path(__file__).parent / "reference"
MADE = "Made from the code by `make docs`; edit it there.\n"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def settings_page() -> str:
    rows = []
    for name, field in Settings.model_fields.items():
        if field.default_factory is not None:
            default = ""
        elif field.default is PydanticUndefined:
            default = "*required*"
        elif isinstance(field.default, tuple):
            default = f"`{','.join(map(str, field.default))}`" if field.default else ""
        else:
            default = "" if field.default is None else f"`{field.default}`"
        rows.append([f"`{variable(name)}`", default, field.description or ""])
    return (
        f"# Settings\n\n{MADE}\nEach is an environment variable, or a file named by the same variable with `_FILE` "
        "(for secrets of Docker and Kubernetes). A value that is wrong ends the process at start with a sentence.\n\n"
        + table(["Variable", "Default", "Meaning"], rows)
    )


def metrics_page() -> str:
    rows = []
    declared = [metric for metric in vars(metrics).values() if isinstance(metric, MetricWrapperBase)]
    for metric in sorted(declared, key=lambda metric: metric._name):
        described = next(iter(metric.describe()))
        name = described.name + ("_total" if described.type == "counter" else "")
        labels = ", ".join(f"`{label}`" for label in metric._labelnames)
        rows.append([f"`{name}`", described.type, labels, described.documentation])
    return (
        f"# Metrics\n\n{MADE}\nWeb and worker each serve theirs at `/metrics` of the operations port. No job id, URL "
        "or tenant is ever a label.\n\n" + table(["Metric", "Type", "Labels", "Meaning"], rows)
    )


def errors_page() -> str:
    problems = [[f"`urn:headway:problem:{p.slug}`", str(p.status), p.title, first(p.__doc__)] for p in errors.PROBLEMS]
    failures = [[f"`{e.slug}`", first(e.__doc__)] for e in errors.JOB_ERRORS]
    return (
        f"# Errors\n\n{MADE}\n## Answers of the API\n\nEvery answer that is not a success is "
        "`application/problem+json` (RFC 9457). `type` never changes; `detail` says what to do; `errors` lists single "
        "fields.\n\n"
        + table(["Type", "Status", "Title", "Meaning"], problems)
        + "\n## Why jobs fail\n\nA failed job has an `error` with one of these types and a message.\n\n"
        + table(["Type", "Meaning"], failures)
    )


def states_page() -> str:
    rows = [
        [f"`{state}`", ", ".join(f"`{to}`" for to in sorted(states.TRANSITIONS[state])) or "nothing: terminal"]
        for state in states.JobState
    ]
    return f"# States\n\n{MADE}\n" + table(["State", "May become"], rows)


def first(doc: str | None) -> str:
    return " ".join((doc or "").split())


PAGES = {
    "settings.md": settings_page,
    "metrics.md": metrics_page,
    "errors.md": errors_page,
    "states.md": states_page,
}


def main() -> int:
    stale = []
    for name, page in PAGES.items():
        path, text = HERE / name, page()
        if "--check" in sys.argv:
            if not path.exists() or path.read_text() != text:
                stale.append(path)
        else:
            path.write_text(text)
    for path in stale:
        sys.stderr.write(f"{path} has fallen behind the code; run `make docs`.\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
