import subprocess
import sys
import time

from flows import services


def test_a_server_that_dies_is_started_again_until_it_is_no_longer_needed():
    started = []

    def start():
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"]))
        return started[-1]

    with services._kept(start) as first:
        assert first is started[0]
        first.kill()
        deadline = time.monotonic() + 30
        while len(started) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert started[1].poll() is None
    assert all(process.poll() is not None for process in started)
    time.sleep(1.2)
    assert len(started) == 2
