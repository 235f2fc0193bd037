"""Write, or serve, the dashboard of runs: txl-dashboard 'run=runs/*'."""

from pathlib import Path

from txl_dist.cli import command
from txl_dist.config.schema import DashboardJob
from txl_dist.pages.serve import PageServer
from txl_dist.tracking.dashboard.dashboard import (
    FILE,
    dashboard_data,
    dashboard_page,
    recorded_runs,
    recorded_version,
    write_page,
)


def dashboard(job: DashboardJob) -> None:
    """Write one page for all runs, and print its path; or serve it, with new data while the runs train.

    Raises:
        UserError: where a file of a run is not a file, or the port is in use.
    """
    if job.serve:
        serve(job)
        return
    runs = recorded_runs(job.run)
    default = Path(runs[0]) / FILE if len(runs) == 1 else Path(FILE)
    path = Path(job.to) if job.to is not None else default
    write_page(runs, path)
    print(path)


def serve(job: DashboardJob) -> None:
    """Serve the page until Ctrl-C; runs that a glob matches later are shown, too."""
    server = PageServer(
        job.port,
        version=lambda: recorded_version(recorded_runs(job.run)),
        data=lambda: dashboard_data(recorded_runs(job.run)),
        page=dashboard_page,
    )
    with server:
        print(f"The dashboard is at {server.address} until Ctrl-C.", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def main() -> None:
    command("dashboard", DashboardJob, dashboard)


if __name__ == "__main__":
    main()
