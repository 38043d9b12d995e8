#!/bin/bash
# guest.sh - run a shell script as root in a throw-away Debian 12 guest that has the kernel's own
# NVMe/TCP and NFS clients; exit with its status.
#
#   guest.sh [-k debian|uml] [-s DIR] [-c CPUS] [-m MIB] [-t SECONDS] SCRIPT [ARG...]
#   guest.sh prepare     only fill the cache (once; 1 to 2 minutes, 1.9 GB)
#     SCRIPT    file run with bash in the guest ('-': read from standard input)
#     -k        debian: Debian stable's kernel under QEMU without KVM; uml: the User-Mode Linux
#               that uml_kernel.sh builds once, several times faster; default: uml if it is there
#     -s DIR    host directory shared read-write as /mnt/host in the guest (hostfs or 9p)
#   environment: GUEST_CACHE (cache directory)
#
# In the guest 10.0.2.2 is the HOST's 127.0.0.1 (QEMU user networking, any TCP port). The root
# disk is written to a temporary overlay: every run starts from the same state.
# Exit status: the script's; 124 on time-out; 125 when the guest died without a status. The
# kernel console of the last run is $GUEST_CACHE/console.log.
# Needs root, a Debian host with apt, perl, mkfs.ext4 and xz; installs nothing there.
set -euo pipefail
CACHE=${GUEST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/space-test-guest} ROOT=$CACHE/root
KERNEL=debian SHARE='' CPUS=2 MEM=2048 LIMIT=600; [ ! -e "$CACHE/linux-uml" ] || KERNEL=uml
PACKAGES=busybox-static,kmod,iproute2,procps,e2fsprogs,xfsprogs,nvme-cli,nfs-common
PACKAGES=$PACKAGES,nfs-kernel-server,fio,python3,netbase,ca-certificates,qemu-system-x86
PACKAGES=$PACKAGES,git,sqlite3,attr,perl

# the URI apt already uses for a release
mirror() { apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' | awk -v r="$1" '$2==r {print $1; exit}'; }

# --- once: a Debian bookworm root tree, its ext4 image, and one initramfs per kernel ---------
prepare() {
  [ "$(cat "$CACHE/done" 2>/dev/null)" != "$PACKAGES" ] || return 0
  echo "guest.sh: preparing $CACHE" >&2; mkdir -p "$CACHE"; cd "$CACHE"; rm -rf root mm disk.img initrd-*
  apt-get download -qq mmdebstrap; dpkg -x mmdebstrap_*.deb mm; rm mmdebstrap_*.deb
  # In the new tree: unpack (not install) the newest kernel, less drivers that no virtual
  # machine needs. dpkg -x straight into / would replace the /lib symlink.
  cat >inner <<'EOF'
set -e; mkdir /k; cd /k
p=$(apt-cache show --no-all-versions linux-image-amd64 | sed -n 's/^Depends: \(linux-image[^ ,]*\).*/\1/p' | head -1)
apt-get download -qq "$p"; dpkg -x "$p"_*.deb x
(cd x/lib/modules; rm -rf */kernel/{sound,drivers/gpu,drivers/media,drivers/net/wireless})
mv x/lib/modules /usr/lib/; mv x/boot/* /boot/; cd /; rm -r /k
for k in /usr/lib/modules/*; do depmod "${k##*/}"; done
EOF
  # the mirrors this machine already uses
  local m s; m=$(mirror bookworm) s=$(mirror bookworm-security)
  perl mm/usr/bin/mmdebstrap --quiet --mode=root --variant=minbase --format=directory \
    --include="$PACKAGES" --aptopt='APT::Install-Recommends "false"' \
    --customize-hook='chroot "$1" bash <inner' \
    bookworm root "deb $m bookworm main" "deb $m bookworm-updates main" \
    "deb $s bookworm-security main" >&2
  truncate -s 8G disk.img; mkfs.ext4 -q -F -O ^has_journal -d root disk.img
  for k in root/usr/lib/modules/* uml; do initramfs "${k##*/}"; done
  rm -rf mm inner; echo "$PACKAGES" >"$CACHE/done"
}

# initramfs RELEASE|uml: busybox, the modules that reach the root disk, and an init
initramfs() {
  local d=$CACHE/initramfs; rm -rf "$d"; mkdir -p "$d"/{bin,m,proc,sys,dev,new}
  cp "$ROOT/bin/busybox" "$d/bin/"; ln -s busybox "$d/bin/sh"; : >"$d/load"
  # insmod lines in dependency order, first mention only
  [ "$1" = uml ] || chroot "$ROOT" modprobe -aDS "$1" virtio_pci virtio_blk virtio_net ext4 \
      crc32c_generic 9p 9pnet_virtio 2>/dev/null |
    awk '$1=="insmod" && !s[$2]++ {print $2}' | while read -r m; do
      xz -dcf "$ROOT$m" >"$d/m/${m##*/}"; echo "insmod /m/${m##*/}"; done >"$d/load"
  cat >"$d/init" <<'EOF'
#!/bin/sh
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; . /load
until mount -t ext4 /dev/vda /new || mount -t ext4 /dev/ubda /new; do sleep 0.05; done 2>/dev/null
for d in proc sys dev; do mount --move /$d /new/$d; done
cp /job /args /run.sh /new/root/; exec switch_root /new /bin/bash /root/run.sh
EOF
  # second stage, on the real root; $share comes from the kernel command line
  cat >"$d/run.sh" <<'EOF'
mount -t tmpfs tmp /tmp; mount -t tmpfs run /run; mkdir -p /dev/pts /dev/shm /run/lock /mnt/host
mount -t devpts pts /dev/pts; mount -t tmpfs shm /dev/shm; hostname guest; ulimit -n 65536
ip link set lo up; for e in eth0 vec0; do [ -e /sys/class/net/$e ] && break; done
ip addr add 10.0.2.15/24 dev $e; ip link set $e up; ip route add default via 10.0.2.2
echo nameserver 10.0.2.3 >/etc/resolv.conf
[ -z "$share" ] || mount -t hostfs -o "$share" none /mnt/host 2>/dev/null ||
  mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144 host /mnt/host
# QEMU's network forwards 10.0.2.100 ports 1 and 2 to the host script: output and exit status
cd /root; eval "set -- $(cat args)"; env -u share setsid -w bash job "$@" >/dev/tcp/10.0.2.100/1 2>&1 </dev/null
echo $? >/dev/tcp/10.0.2.100/2; kill -9 -1; sync -f /mnt/host
while ss -tnH state established state fin-wait-1 dst 10.0.2.100 | grep -q .; do sleep 0.02; done
echo o >/proc/sysrq-trigger; sleep 60
EOF
  chmod +x "$d/init"
  (cd "$d"; find . | bin/busybox cpio -o -H newc >"$CACHE/initrd-$1") 2>/dev/null; rm -r "$d"
}

# --- every run: boot, run the job, hand back its status --------------------------------------
boot() {
  [ "$KERNEL" != uml ] || [ -e "$CACHE/linux-uml" ] || { echo "run uml_kernel.sh first" >&2; exit 2; }
  local run release=uml rc='' status=0; run=$(mktemp -d "$CACHE/run.XXXXXX")
  trap "cp -f '$run/console' '$CACHE/console.log'; rm -rf '$run'" EXIT; : >"$run/console"
  if [ "$1" = - ]; then cat; else cat -- "$1"; fi >"$run/job"; shift
  printf '%q ' "$@" >"$run/args"
  [ "$KERNEL" = uml ] || release=$(cd "$ROOT/usr/lib/modules"; ls -d 6.1.*)
  # the job travels as a second archive behind the cached initramfs
  (cd "$run"; printf 'job\nargs\n' | "$ROOT/bin/busybox" cpio -o -H newc >j.cpio) 2>/dev/null
  cat "$CACHE/initrd-$release" "$run/j.cpio" >"$run/initrd"
  local append="panic=-1 quiet share=$SHARE"
  export QEMU_MODULE_DIR=$ROOT/usr/lib/x86_64-linux-gnu/qemu
  local q=("$ROOT/lib64/ld-linux-x86-64.so.2" --library-path
    "$ROOT/lib/x86_64-linux-gnu:$ROOT/usr/lib/x86_64-linux-gnu" "$ROOT/usr/bin/qemu-system-x86_64"
    -L "$ROOT/usr/share/qemu" -L "$ROOT/usr/share/seabios" -nodefaults -no-user-config
    -display none -no-reboot -add-fd fd=3,set=1 -chardev file,id=o,append=on,path=/dev/fdset/1
    -chardev "file,id=r,path=$run/rc" -netdev "user,id=n,guestfwd=tcp:10.0.2.100:1-chardev:o,\
guestfwd=tcp:10.0.2.100:2-chardev:r")
  # descriptor 3 takes the job's output; the pipe makes it write-only, as QEMU wants it
  if [ "$KERNEL" = uml ]; then uml; else qemu; fi 3>&1 >&2 | cat || status=$?
  [ ! -e "$run/rc" ] || rc=$(tr -dc 0-9 <"$run/rc")
  [ -z "$rc" ] || exit "$rc"
  tail -n 20 "$run/console" >&2; [ "$status" = 124 ] || status=125; exit "$status"
}

qemu() {
  q+=(-machine q35,accel=tcg -cpu max,-la57 -smp "$CPUS" -m "$MEM"
    -kernel "$ROOT/boot/vmlinuz-$release" -initrd "$run/initrd" -serial "file:$run/console"
    -append "console=ttyS0 mitigations=off audit=0 apparmor=0 nokaslr $append"
    -drive "file=$CACHE/disk.img,format=raw,if=virtio,snapshot=on,file.locking=off"
    -device virtio-net-pci,netdev=n,romfile=)
  [ -z "$SHARE" ] || q+=(-virtfs "local,path=$SHARE,mount_tag=host,security_model=none")
  TMPDIR=$run timeout --foreground "$LIMIT" "${q[@]}" </dev/null
}

# User-Mode Linux; its network is a QEMU without a machine, across a datagram socket pair
uml() {
  local u=("$CACHE/linux-uml" mem="${MEM}M" ncpus="$CPUS" seccomp=on initrd="$run/initrd"
    ubd0="$run/cow,$CACHE/disk.img" con=null con0=null,fd:2 $append)
  perl -MSocket -e 'my ($limit, $n, @u) = @ARGV; my @q = splice @u, 0, $n; my $late = 0; $^F = 99;
    socketpair(my $a, my $b, AF_UNIX, SOCK_DGRAM, 0) or die;
    my $q = fork // die;
    sub bound { syscall 157, 1, 9 }  # prctl(PR_SET_PDEATHSIG): it ends with this one, also where this one is killed
    $q or bound() or exec @q, qw(-machine none -netdev hubport,id=x,hubid=0,netdev=n -netdev),
      "dgram,id=d,local.type=fd,local.str=" . fileno($b), qw(-netdev hubport,id=y,hubid=0,netdev=d);
    my $u = fork // die; $u or bound() or exec @u, "vec0:transport=fd,fd=" . fileno($a);
    $SIG{ALRM} = $SIG{INT} = $SIG{TERM} = sub { $late = 124; kill 15, $u }; alarm $limit;
    1 until waitpid($u, 0) == $u; kill 15, $q; waitpid $q, 0; exit $late' \
    "$LIMIT" ${#q[@]} "${q[@]}" "${u[@]}" </dev/null >"$run/console" 2>&1
}

while getopts k:s:c:m:t: o; do case $o in
  k) KERNEL=$OPTARG;; s) SHARE=$(realpath "$OPTARG");; c) CPUS=$OPTARG;; m) MEM=$OPTARG;;
  t) LIMIT=$OPTARG;; *) exit 2;; esac; done
shift $((OPTIND - 1))
[ $# -ge 1 ] || { sed -n '2,18s/^# \{0,1\}//p' "$0" >&2; exit 2; }
(prepare)
[ "$1" = prepare ] || boot "$@"
