#!/bin/sh
# TLS certificates for the server (by openssl), and a key for each client (by ssh-keygen, whose format SuperNodes read):
#     flower/certificates.sh FOLDER HOST[,HOST...] CLIENTS
# ca.crt goes to everybody, client-K to client K alone, server.key and client-K.pub stay with the server; ca.key goes nowhere.
set -eu
if [ $# -ne 3 ]; then
    echo "usage: $0 FOLDER HOST[,HOST...] CLIENTS" >&2
    exit 2
fi
umask 077
mkdir -p "$1"
cd "$1"
if [ -e ca.key ]; then
    echo "$0: $1 holds certificates already" >&2
    exit 2
fi
# the SuperLink starts a process that calls it at 127.0.0.1
names=$(echo "127.0.0.1,$2" | tr ',' '\n' | sed -E '/^[0-9.]+$|:/s/^/IP:/; t; s/^/DNS:/' | paste -sd, -)

key() { openssl genpkey -quiet -algorithm EC -pkeyopt ec_paramgen_curve:P-384 -out "$1"; }
key ca.key
openssl req -new -x509 -key ca.key -days 3650 -subj "/CN=FedU" -addext "keyUsage=critical,keyCertSign,cRLSign" -out ca.crt
key server.key
openssl req -new -key server.key -subj "/CN=FedU server" -out server.csr
printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth\n' "$names" > server.ext
openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 3650 -extfile server.ext -out server.crt 2> /dev/null
rm server.csr server.ext ca.srl

for k in $(seq 0 $(($3 - 1))); do
    ssh-keygen -q -t ecdsa -b 384 -N "" -C "client $k" -f "client-$k"
done
