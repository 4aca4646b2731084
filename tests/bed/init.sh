#!/bin/sh
# The first process in the machine. Over this machine's files, which are read only, lies a layer in
# memory that takes what is written; /run and /dev/shm are empty. /mnt/run says what to do.
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
. /modules/load.sh
files=trans=virtio,version=9p2000.L,msize=524288
mkdir -p /layers/below /layers/memory
mount -t 9p -o $files,ro,cache=loose files /layers/below
mount -t tmpfs -o size=75% memory /layers/memory
mkdir -p /layers/memory/above /layers/memory/work
mount -t overlay -o lowerdir=/layers/below,upperdir=/layers/memory/above,workdir=/layers/memory/work \
    machine /machine || echo "bed: this machine's files cannot be mounted"
mount -t proc proc /machine/proc
mount -t sysfs sys /machine/sys
mount -t devtmpfs dev /machine/dev
mkdir -p /machine/dev/shm /machine/dev/pts
mount -t devpts pts /machine/dev/pts
mount -t tmpfs memory /machine/dev/shm
mount -t tmpfs memory /machine/run
mount -t 9p -o $files,cache=none shared /machine/mnt
echo "bed: booted"
chroot /machine /bin/sh /mnt/run
echo "bed: ended"
poweroff -f
