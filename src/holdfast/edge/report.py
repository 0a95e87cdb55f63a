"""An audit printed for a human."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from holdfast.audit import Report


def show(report: Report, console: Console) -> None:
    """Print an audit for a human."""
    figures = Table("figure", "value", title="holdfast verify")
    for name, value in report.figures.items():
        figures.add_row(name, str(value))
    console.print(figures)
    for finding in report.findings:
        console.print(f"[red]VIOLATED[/red] {finding.name}: {finding.promise} ({finding.count} rows)", highlight=False)
        for row in finding.rows:
            console.print(
                "  " + ", ".join(f"{key}={value}" for key, value in row.items()), markup=False, soft_wrap=True
            )
    verdict = "[green]clean[/green]" if report.clean else f"[red]{len(report.findings)} promises broken[/red]"
    console.print(f"{report.checks} checks: {verdict}", highlight=False)
