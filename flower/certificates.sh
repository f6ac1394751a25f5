#!/bin/sh
# TLS certificates for the server (by openssl 1.1.1 or 3), and a key for each client (by ssh-keygen, whose format SuperNodes read):
#     flower/certificates.sh FOLDER HOST[,HOST...] CLIENTS
# ca.crt goes to everybody, client-K to client K alone, server.key and client-K.pub stay with the server; ca.key goes nowhere.
set -eu
refuse() {
    echo "$0: error: $1" >&2
    exit 2
}
[ $# -eq 3 ] || refuse "got $# arguments, needs FOLDER HOST[,HOST...] CLIENTS, as: keys fedu.example.org 3"
folder=$1 hosts=$2 clients=$3

case $folder in
"") refuse "FOLDER is empty, needs the name of a new folder" ;;
-*) folder=./$folder ;;
esac
[ ! -e "$folder" ] && [ ! -L "$folder" ] || refuse "FOLDER $folder exists already, needs the name of a new folder"
[ -d "$(dirname "$folder")" ] || refuse "FOLDER $folder cannot be made: $(dirname "$folder") is not a folder"

check_host() {
    wanted="needs a name such as fedu.example.org, or an IP address"
    case $1 in
    "") refuse "HOST has an empty name, $wanted" ;;
    */*) refuse "HOST $1 is a URL or a path, $wanted" ;;
    *[!A-Za-z0-9.:-]*) refuse "HOST '$1' has a character that no host's name has, $wanted" ;;
    *:*:*) return ;; # IPv6: openssl says whether it is one
    *:*) refuse "HOST $1 has a port, $wanted" ;;
    *[!0-9.]*) pattern='^([A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)*[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?$' ;;
    *) pattern='^((25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])(\.|$)){4}$' ;;
    esac
    echo "$1" | grep -Eq "$pattern" && [ "${1%.}" = "$1" ] && [ ${#1} -le 253 ] || refuse "HOST $1 is no host's name or address, $wanted"
}
names=IP:127.0.0.1 rest=$hosts, # the SuperLink starts a process that calls it at 127.0.0.1
while [ -n "$rest" ]; do
    host=${rest%%,*} rest=${rest#*,}
    check_host "$host"
    case $host in
    *:* | *[!0-9.]*) case $host in *:*) names=$names,IP:$host ;; *) names=$names,DNS:$host ;; esac ;;
    *) names=$names,IP:$host ;;
    esac
done

case $clients in
"" | 0* | *[!0-9]* | ?????*) refuse "CLIENTS got '$clients', needs a whole number from 1 to 9999" ;;
esac
for program in openssl ssh-keygen; do
    command -v "$program" > /dev/null || refuse "$program is not installed"
done

# all is made in a folder of another name, which appears as FOLDER when it is complete
umask 077
made=$(mktemp -d "$(dirname "$folder")/.certificates.XXXXXX" 2> /dev/null) || refuse "FOLDER $folder cannot be made: no right to write there"
trap 'rm -rf "$made"' EXIT
trap 'exit 130' INT TERM HUP

hint=
run() { "$@" > "$made/said" 2>&1 < /dev/null || refuse "$1 failed: $(grep -v '^[.+*-]*$' "$made/said" | head -n 1)$hint"; }
key() { run openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-384 -out "$made/$1"; }
key ca.key
run openssl req -new -x509 -key "$made/ca.key" -days 3650 -subj "/CN=FedU" -addext "keyUsage=critical,keyCertSign,cRLSign" -out "$made/ca.crt"
key server.key
run openssl req -new -key "$made/server.key" -subj "/CN=FedU server" -out "$made/server.csr"
printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth\n' "$names" > "$made/server.ext"
case $hosts in *:*) hint="; HOST $hosts has something that is no IPv6 address" ;; esac
run openssl x509 -req -in "$made/server.csr" -CA "$made/ca.crt" -CAkey "$made/ca.key" -CAcreateserial -days 3650 \
    -extfile "$made/server.ext" -out "$made/server.crt"

for k in $(seq 0 $((clients - 1))); do
    run ssh-keygen -q -t ecdsa -b 384 -N "" -C "client $k" -f "$made/client-$k"
done
rm -f "$made/server.csr" "$made/server.ext" "$made/ca.srl" "$made/said"
mv "$made" "$folder"
