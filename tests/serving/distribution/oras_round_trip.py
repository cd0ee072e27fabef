"""Push an OCI layout to a registry with oras, and pull it: `LAYOUT REGISTRY FOLDER`, for a Python that has oras."""

import sys

import oras.client
import oras.layout

layout, registry, folder = sys.argv[1:]
client = oras.client.OrasClient(hostname=registry, insecure=True)
target = f"{registry}/models/tiny:v1"
answer = oras.layout.NewLayout(layout).push_to_registry(client, target, tag="v1")
assert answer.status_code in (200, 201), answer.text
client.pull(target=target, outdir=folder)
