"""What pytest prints at the end of its output, besides what it does by itself."""


def pytest_terminal_summary(terminalreporter):
    """Print the seed and the counts of every fuzz test, whichever process ran it."""
    for report in terminalreporter.stats.get("passed", []):
        for line in dict(report.user_properties).get("fuzz", "").splitlines():
            terminalreporter.write_line(f"{report.nodeid}: {line}")
