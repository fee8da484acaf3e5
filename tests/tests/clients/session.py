"""What a test of somebody's does with testcontainers: `session.py whole` tidies up, `session.py cut` is killed in the
middle of it. Prints what it saw, then its session."""

import os
import signal
import sys
import urllib.request

from testcontainers.core.container import DockerContainer
from testcontainers.core.labels import SESSION_ID
from testcontainers.core.network import Network
from testcontainers.core.wait_strategies import HttpWaitStrategy, LogMessageWaitStrategy

PAGE = "mkdir /www; echo $TEXT >/www/index.html; echo ready; exec httpd -f -p 80 -h /www"


def server(text):
    return (
        DockerContainer("busybox")
        .with_command(["sh", "-c", PAGE])
        .with_env("TEXT", text)
        .with_exposed_ports(80)
        .waiting_for(LogMessageWaitStrategy("ready"))
    )


def main():
    with Network() as network:
        with server("first").with_network(network).with_network_aliases("one") as one:
            HttpWaitStrategy(80).for_status_code(200).wait_until_ready(one)
            address = f"http://{one.get_container_host_ip()}:{one.get_exposed_port(80)}"
            print(urllib.request.urlopen(address, timeout=30).read().decode().strip())
            client = DockerContainer("busybox").with_command("sleep 1000").with_network(network)
            with client:
                code, output = client.exec(["wget", "-qO-", "http://one"])
                print(code, output.decode().strip())
                if sys.argv[1] == "cut":
                    print(SESSION_ID, flush=True)
                    os.kill(os.getpid(), signal.SIGKILL)
    print(SESSION_ID)


main()
