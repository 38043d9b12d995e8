# What every job of test_nfs_kernel.py begins with: $1 is the server's port, $2 the client's name.
set -euo pipefail
# As grep -q, but reads all: who writes to a pipe that is closed early is killed, and pipefail takes that for a failure.
has() { grep "$@" >/dev/null; }
PORT=$1
hostname "$2" # a client is known by its host's name, and two guests are two clients
modprobe -q nfsv4 || true # built in under User-Mode Linux
mkdir -p /n; [ -e /dev/fd ] || ln -s /proc/self/fd /dev/fd

# mounted VERSION [OPTION,...]: the export on /n, with short time-outs
mounted() { mount -t nfs4 -o "vers=$1,port=$PORT,noresvport${2:+,$2}" 10.0.2.2:/ /n; }
# anew VERSION [OPTION,...]: the same once more, with nothing kept from before
anew() { umount /n; echo 3 >/proc/sys/vm/drop_caches; mounted "$@"; }
fails() { local wanted=$1; shift; if "$@" >/tmp/said 2>&1; then exit 1; fi; grep -q "$wanted" /tmp/said; }

# ask WORD...: has the test do something outside, and prints its answer
ask() {
  echo "$*" >/mnt/host/asking; mv /mnt/host/asking /mnt/host/ask
  while [ -e /mnt/host/ask ]; do sleep 0.05; done
  cat /mnt/host/answer
}

# under COMMAND...: runs it while the server is killed twice; it must not notice. It goes on as long as there is /tmp/under
under() {
  touch /tmp/under; set -m; "$@" >/tmp/load 2>&1 & local load=$! i; set +m # a process group of its own
  for i in 1 2; do
    sleep 3; kill -0 $load || { cat /tmp/load; exit 1; }
    [ -z "${held-}" ] || hold $load
    ask kill; kill -CONT -- -$load; ask restart
  done
  sleep 3; kill -0 $load || { cat /tmp/load; exit 1; }
  rm /tmp/under; wait $load || { cat /tmp/load; exit 1; }
}

# between COMMAND...: the same for what makes, renames and removes names. None of its system calls is under way when the
# server dies, because the second answer to what was done already is that it is there, or gone (docs/nfs.md). It makes
# them while there is no server.
between() { local held=1; under "$@"; }

# hold GROUP: stops its processes, and waits until each has come back from its system call
hold() {
  kill -STOP -- -$1
  while ps -eo pgid=,stat= | awk -v group=$1 '$1 == group && $2 !~ /^[TZ]/ { found = 1 } END { exit !found }'; do
    sleep 0.05
  done
}
