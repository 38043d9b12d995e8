# What every job of test_csi_network.py begins with: $1 is this node's name; the rest is what csi_node.py is to do.
set -euo pipefail
modprobe -q -a nfsv4 nvme-tcp loop || true # built in under User-Mode Linux
[ -e /dev/fd ] || ln -s /proc/self/fd /dev/fd
hostname "$1"
export PYTHONPATH=/mnt/host/packages PYTHONPYCACHEPREFIX=/tmp/bytecode PYTHONUNBUFFERED=1
exec python3 /mnt/host/packages/tests/guest/csi_node.py "$@"
