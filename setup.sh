#!/usr/bin/env bash
# Puts coap_websocket on a Raspberry Pi, or takes it away without a trace: sudo bash setup.sh [--help]
#
# put_on checks, asks for and prepares everything in a private folder ($stage) before its first change. What is there
# before that change is kept as notes ($kept), from which take_away puts it back. A note is on the disk before anything
# relies on it, and every file is replaced by one rename. So a run may be interrupted anywhere: run it again, or uninstall.

[ -n "${BASH_VERSION:-}" ] || { echo "setup.sh: this needs bash: sudo bash setup.sh" >&2; exit 1; }
set -eu
shopt -s nullglob globstar
umask 077
export LC_ALL=C.UTF-8

usage() {
    cat <<'END'
sudo bash setup.sh [OPTION]...

  --address ADDR/LEN   IPv6 address of the gateway (2001:470:7347:c810::1234/64)
  --interface IF       network interface of the motes (usb0)
  --token-file F       the bot token is the first line of F; "-" asks for a new one
  --password-file F    the same for the password of the bot's config messages
  --uninstall          put everything back as it was before the first run
  --help

Without these files the token and the password come from the environment (BOT_TOKEN, PASSWORD), else from the last
installation, else they are asked for. Blanks and quotes around the line in a file do not count. Address and interface
stay as they were last set.

In the firmware's repository, ../src/config.ini.template is renamed to ../src/config.ini and gets the token too, as the
firmware's build expects it. --uninstall puts it back.
END
}

# What is installed, and from where.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
firmware=$(readlink -m "$here/../src")
binary=/usr/local/bin/coap_websocket
unit=/etc/systemd/system/coap_websocket.service
etc=/etc/coap_websocket
connection=/etc/NetworkManager/system-connections/coap_websocket.nmconnection
udev_rule=/etc/udev/rules.d/90-coap_websocket.rules
rc_local=$(readlink -m /etc/rc.local)  # it may be a link
places=("$binary" "$unit" "$unit.d" "$etc" "$connection" "$udev_rule" /var/{lib,log}/{,private/}coap_websocket
    /etc/systemd/system/*.wants/coap_websocket.service)  # all but rc.local and the firmware's config.ini

# How it is done.
kept=/var/lib/coap_websocket-setup  # the notes: what was there before
stage=$kept/stage                   # what this run prepares; not in /tmp or /run, where programs may not run
facts=coap_websocket-facts          # in the notes: what is no file
part=.coap_websocket-new            # ends the name of a file that is being written
mark='  # coap_websocket'           # ends each of our lines in rc.local
off='# coap_websocket: '            # begins a line of somebody else's there that is commented out

# What a run is told and finds out.
explained=false           # has the fault that ends this run been named?
address='' interface=''   # asked for; then those that the gateway gets
old_address=''            # what the last run gave the Pi
old_interface=''
token_file='' password_file=''
token='' password=''
reply=''                  # what choose has found
is_duplicate=false        # has another host the address?

main() {
    local uninstall=false lock
    while [ $# -gt 0 ]; do
        case $1 in
            --help) usage; return ;;
            --uninstall) uninstall=true; shift; continue ;;
            --address) address=${2:-} ;;
            --interface) interface=${2:-} ;;
            --token-file) token_file=${2:-} ;;
            --password-file) password_file=${2:-} ;;
            *) die "unknown option $1; see bash setup.sh --help" ;;
        esac
        [ -n "${2:-}" ] || die "$1 needs a value; see bash setup.sh --help"
        shift 2
    done
    [ "$(id -u)" = 0 ] || die "not root: run sudo bash setup.sh"
    [ -d /run/systemd/system ] || die "systemd does not run here: start this on the booted Pi"
    command -v ip >/dev/null || die "no ip command: run apt install iproute2"
    exec {lock}</var/lib
    flock -n "$lock" || die "another setup.sh is running: wait for it"
    trap finish EXIT
    trap 'exit 130' INT TERM HUP
    clear_stage
    mkdir -p "$stage" 2>/dev/null || die "cannot write to /var/lib: is the file system read-only, or full?"
    find_last_address
    if $uninstall; then take_away; else put_on; fi
}

die() {
    explained=true
    printf 'setup.sh: %s\n' "$1" >&2
    exit 1
}

finish() {
    local status=$?
    clear_stage
    [ $status = 0 ] || $explained ||
        echo "setup.sh: stopped before the end; mend what was said above, then run the same command again" >&2
}

# Until there is a note, nothing has been changed.
clear_stage() {
    if whole_note before >/dev/null || has_our_lines; then rm -rf "$stage"; else rm -rf "$kept"; fi
}

# The last run's address and interface stand in its line of rc.local.
find_last_address() {
    local line
    line=$(grep -s "^ip -6 addr add .*$mark\$" "$rc_local" | tail -n 1) || true
    [ -z "$line" ] || read -r _ _ _ _ old_address _ old_interface _ <<<"$line"
}

# ---- notes -----------------------------------------------------------------------------------------------------

# If the notes were lost, all that we know is that rc.local was there without our lines.
keep_what_is_there() {
    local path paths=()
    ! whole_note before >/dev/null || return 0
    mkdir "$stage/$facts"
    if has_our_lines; then
        echo "$kept: damaged; what was there before the first run cannot be restored any more"
    else
        ip -6 -o addr show | awk '{ print $2, $4 }' >"$stage/$facts/addresses"
        ! systemctl is-active -q coap_websocket || touch "$stage/$facts/active"
        for path in "${places[@]}" "$rc_local"; do
            if [ -e "$path" ] || [ -L "$path" ]; then paths+=("${path#/}"); fi
        done
    fi
    keep before "${paths[@]}" -C "$stage" "$facts"
}

has_our_lines() { grep -qs "$mark\$" "$rc_local"; }

# keep NAME PATH...: keeps files as a note, twice, for one may get lost.
keep() {
    local note=$kept/$1.tar.gz status=0
    tar -C / --numeric-owner --warning=no-file-changed -czf "$stage/note" "${@:2}" || status=$?
    [ $status -le 1 ] || die "cannot write to $kept: is the disk full?"  # 1: a file changed meanwhile, such as a log
    cp "$stage/note" "$stage/copy"
    sync "$stage/note" "$stage/copy"
    mv "$stage/copy" "$note.copy"
    mv "$stage/note" "$note"
    sync "$kept" /var/lib
}

# Prints the file of a note that is whole.
whole_note() {
    local note
    for note in "$kept/$1.tar.gz" "$kept/$1.tar.gz.copy" "$kept/$1.tar"; do  # the last one is version 1.0's
        if gzip -tq "$note" 2>/dev/null || [[ $note == *.tar && -s $note ]]; then echo "$note"; return; fi
    done
    return 1
}

unpack_notes() {
    local name note
    mkdir -p "$1/$facts"
    for name in "$kept"/*.tar*; do
        name=${name##*/}
        ! note=$(whole_note "${name%%.tar*}") || tar -C "$1" --numeric-owner -xpf "$note"
    done
    [ ! -e "$kept/addresses" ] || cp "$kept/addresses" "$1/$facts"  # version 1.0's
    [ ! -e "$kept/active" ] || cp "$kept/active" "$1/$facts"
    [ ! -e "$kept/firmware" ] || cp -a "$kept/firmware/." "$1"
}

# ---- put on ----------------------------------------------------------------------------------------------------

put_on() {
    export -n BOT_TOKEN PASSWORD  # not for our children
    prepare_unit_and_binary
    prepare_settings
    prepare_firmware
    prepare_rc_local
    prepare_interface

    [ "$(stat -f -c %T /)" != overlayfs ] ||
        echo "warning: the root file system is an overlay: unless that is switched off, nothing of this outlasts a reboot"
    keep_what_is_there
    place binary "$binary"
    place unit "$unit"
    place config.ini "$etc/config.ini"
    place env "$etc/.env"
    [ ! -e "$stage/firmware.ini" ] || place_in_firmware
    [ "$old_address $old_interface" = "$address $interface" ] || drop_address "$old_address" "$old_interface"
    place rc.local "$rc_local"
    sed -n "s|^$off|$rc_local: commented out: |p" "$rc_local"
    place connection "$connection"
    place udev_rule "$udev_rule"
    sync
    add_address
    start
}

prepare_unit_and_binary() {
    local source=$here/coap_websocket said
    [ -f "$here/coap_websocket.service" ] ||
        die "coap_websocket.service is not beside setup.sh: copy the whole folder, then run it there"
    install -m 644 "$here/coap_websocket.service" "$stage/unit"

    [ -f "$source" ] || source=$here/target/release/coap_websocket
    [ -f "$source" ] || die 'no coap_websocket beside setup.sh: see "Get the binary" in README.md'
    install -m 755 "$source" "$stage/binary"
    said=$(timeout 10 "$stage/binary" --version 2>&1 </dev/null) || true
    [[ $said == "coap_websocket "[0-9]* ]] ||
        die "$source does not run on this $(dpkg --print-architecture) system (${said##*: }): see \"Get the binary\" in README.md"
}

# ---- put on: address, rc.local, NetworkManager or udev ---------------------------------------------------------

choose_address() {
    local wanted=${address:-${old_address:-2001:470:7347:c810::1234/64}}
    interface=${interface:-${old_interface:-usb0}}
    [ -e /proc/net/if_inet6 ] || die "this kernel runs without IPv6: take ipv6.disable=1 out of its command line and reboot"
    address=$(as_the_kernel_spells "$wanted")
    # A length such as 064 would be read as octal; what has a dot is an address of IPv4.
    [[ $address && ${address#*/} == "${wanted##*/}" && $address != *.* ]] ||
        die "$wanted is not an IPv6 address for a gateway, with its prefix length, such as fd00:1234::1/64"
    [[ $interface =~ ^[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}$ ]] || die "$interface is not the name of an interface, such as usb0"
}

# Prints what the kernel makes of an address, in a network of its own; nothing if motes could not use it.
as_the_kernel_spells() {
    # shellcheck disable=SC2016
    unshare --net bash -c 'ip link set lo up && ip -6 addr add "$1" dev lo && ip -6 -o addr show dev lo scope global' \
        bash "$1" 2>/dev/null | awk '{ print $4 }'
}

prepare_rc_local() {
    local was=$stage/rc.local.was
    if [ -e "$rc_local" ]; then cp -aT "$rc_local" "$was"; else new_rc_local "$was"; fi
    { [ -f "$was" ] && ! LC_ALL=C grep -aqP '\0' "$was"; } ||
        die "$rc_local is not a text file: move it away, then run this again"
    [ "$(head -c 2 "$was")" != '#!' ] || head -n 1 "$was" | grep -Eq '^#! *(/usr)?/bin/(env +)?(ba|da)?sh( .*)?$' ||
        die "$rc_local is not a shell script: move it away, then run this again"
    [ -x "$was" ] || chmod 755 "$was"  # else it never runs
    cp -a "$was" "$stage/rc.local"
    with_our_lines "$was" >"$stage/rc.local"
    ! bash -n "$was" 2>/dev/null || bash -n "$stage/rc.local" 2>/dev/null ||
        die "$rc_local adds $address in a way that cannot be commented out: remove that there, then run this again"
}

new_rc_local() { printf '%s\n' '#!/bin/sh' 'exit 0' >"$1"; chmod 755 "$1"; }

# Right behind the shebang our lines run, whatever exit comes later. They cannot fail, which would end a script under -e.
with_our_lines() {
    local theirs=$stage/rc.local.theirs shebang='#!/bin/sh' rest=1
    without_our_lines "$1" >"$theirs"
    if [ "$(head -c 2 "$theirs")" = '#!' ]; then shebang=$(head -n 1 "$theirs") rest=2; fi
    printf '%s\n' "$shebang" "sleep 1$mark" "ip link set dev $interface up || true$mark" \
        "ip -6 addr add $address dev $interface || true$mark"
    sed "$(lines_that_add_it "$theirs")" "$theirs" | tail -n "+$rest"
}

without_our_lines() { sed -e "/$mark\$/d" -e "s/^$off//" "$1"; }

# Of two owners of an address the second one fails. Prints for sed how to comment out each line that adds it, in whatever
# spelling, with the lines that continue it.
lines_that_add_it() {
    local number=0 line lines word adds='(^|[^[:alnum:]_-])ip +([^;&|]* )?a(d|dd|ddr|ddre|ddres|ddress)? +(a|ad|add|r[a-z]*|c[a-z]*) '
    while IFS= read -r line || [ -n "$line" ]; do
        number=$((number + 1)) lines=$number
        [[ $line =~ $adds && ! $line =~ ^[[:space:]]*'#' ]] || continue
        [[ $line != *\\ ]] || lines="$number,/[^\\]\$/"
        while read -r word; do
            [ "$(as_the_kernel_spells "$word")" != "${address%/*}/128" ] || echo "$lines s/^/$off/"
        done < <(grep -oE '[[:xdigit:]]*:[[:xdigit:]:]+' <<<"$line")
    done <"$1"
}

# NetworkManager takes away an address that it does not know. Where it does not look after the interface, nobody else
# brings that up when it appears.
prepare_interface() {
    if systemctl is-active -q NetworkManager &&
        [[ $(nmcli -g GENERAL.STATE device show "$interface" 2>/dev/null) != *unmanaged* ]]; then
        printf '%s\n' '[connection]' id=coap_websocket type=ethernet "interface-name=$interface" autoconnect-priority=10 '' \
            '[ipv4]' method=disabled '' '[ipv6]' method=manual "address1=$address" >"$stage/connection"
    elif [ -d "${udev_rule%/*}" ]; then
        printf 'ACTION=="add|move", SUBSYSTEM=="net", KERNEL=="%s", RUN+="%s", RUN+="%s"\n' "$interface" \
            "$(command -v ip) link set dev $interface up" "$(command -v ip) -6 addr add $address dev $interface" >"$stage/udev_rule"
        chmod 644 "$stage/udev_rule"
    fi
}

# ---- put on: config.ini and .env -------------------------------------------------------------------------------

# The program judges all values. What somebody wrote into .env by hand as address stays until another one is asked for.
prepare_settings() {
    local offer listen='' refusal
    [ -n "$address" ] || listen=$(value_of "$etc/.env" COAP_SERVER_IP)
    choose_address
    choose "bot token" "$token_file" "${BOT_TOKEN:-}" "$(value_of "$etc/config.ini" bot_token)" \
        "$(value_of "$firmware/config.ini" bot_token)"
    token=$reply
    offer=$(value_of "$firmware/.env" PASSWORD)
    choose password "$password_file" "${PASSWORD:-}" "$(value_of "$etc/.env" PASSWORD)" \
        "${offer:-$(value_of "$here/.env" PASSWORD)}"
    password=$reply
    with_value "$etc/config.ini" bot_token "$token" >"$stage/config.ini"
    with_value "$etc/.env" PASSWORD "$password" >"$stage/env.password"
    with_value "$stage/env.password" COAP_SERVER_IP "${listen:-${address%/*}}" >"$stage/env"
    refusal=$(refusal_of "$stage")
    [ -z "$refusal" ] || die "$refusal: mend it, then run this again; nothing was changed"
    [[ ! $password =~ (--|\*\*|__|~~|'||'|'<<'|'>>'|'...'|'`') ]] ||
        echo "warning: Telegram's apps rewrite ${BASH_REMATCH[1]} while it is typed; a password without it: --password-file -"
}

# choose WHAT FILE GIVEN INSTALLED OFFER: sets reply from the file, else to what the environment gave, else to what is
# installed, else to what is typed on the terminal, where Enter takes the offer.
choose() {
    local what=$1 file=$2 given=$3 installed=$4 offer=$5 refusal hidden='' hint="as BotFather shows it"
    if [ "$file" = - ]; then
        given='' installed='' offer=''
    elif [ -n "$file" ]; then
        given=$(head -n 1 "$file" 2>/dev/null | bare)
        [ -n "$given" ] || die "cannot read the $what from $file: write it there as the first line, then run this again"
    fi
    [ -z "$(refusal_of_value "$what" "$offer")" ] || offer=''
    [ "$what" != password ] || hidden=s hint="8 characters or more, no blanks"
    reply=${given:-$installed}
    while refusal=$(refusal_of_value "$what" "$reply"); [ -n "$refusal" ]; do
        [ -z "$given" ] || die "that is no $what: $refusal; nothing was changed"
        [ -t 0 ] || die "no $what and no terminal to ask for it: write it to a file, then run this with --${what#* }-file FILE"
        [ -z "$reply" ] || echo "That is no $what: $refusal." >&2
        printf '%s (%s)%s: ' "${what^}" "$hint" "${offer:+, or Enter for the one of the program before}" >&2
        read "-r$hidden" reply || die "no $what: nothing was changed"
        [ -z "$hidden" ] || echo >&2
        reply=${reply:-$offer}
    done
}

# Prints why a token or a password will not do, nothing if it will. The program is asked about it alone, so that nothing
# else can be the reason.
refusal_of_value() {
    local try=$stage/try refusal
    rm -rf "$try"
    mkdir "$try"
    if [ "$1" = password ]; then
        [ ${#2} -ge 8 ] || { echo "it needs 8 characters or more"; return; }
        setting PASSWORD "$2" >"$try/env"
    else
        [[ $2 && $2 != your_telegram_bot_token ]] || { echo "BotFather gives you one"; return; }
        { echo '[telegram]'; setting bot_token "$2"; } >"$try/config.ini"
    fi
    refusal=$(refusal_of "$try")
    echo "${refusal#*:[12]: }"
}

# Prints why the program would not start with the config.ini and env of a folder, nothing if it would.
refusal_of() {
    local said status=0
    said=$(cd / && env -i PATH="$PATH" CREDENTIALS_DIRECTORY="$1" "$stage/binary" check --settings 2>&1) || status=$?
    [ $status != 0 ] || return 0
    [ $status = 1 ] || { echo "this coap_websocket is older than this setup.sh"; return; }
    said=${said##*$'\n'} said=${said#coap_websocket: } said=${said//"$1/config.ini"/"$etc/config.ini"}
    echo "${said//"$1/env"/"$etc/.env"}"
}

# line_of FILE KEY: the number of the line that sets it, which in an INI file stands under [telegram].
line_of() {
    [ ! -f "$1" ] || LC_ALL=C awk -v key="$2" '
        { line = (key ~ /[a-z]/) ? tolower($0) : $0 }
        NR == 1 { sub(/^\357\273\277/, "", line) }
        line ~ /^[ \t]*\[/ { elsewhere = (line !~ /^[ \t]*\[[ \t]*telegram[ \t]*\]/) }
        !elsewhere && line ~ "^[ \t]*(export[ \t]+)?" key "[ \t]*=" { number = NR }
        END { if (number) print number }' "$1"
}

# value_of FILE KEY
value_of() {
    local number
    number=$(line_of "$1" "$2")
    [ -z "$number" ] || sed -n "$number{s/^[^=]*=//;p}" "$1" | bare
}

# Takes a BOM, a carriage return, blanks and quotes off both ends of a line.
bare() { LC_ALL=C sed "s/^\xef\xbb\xbf//; s/^[[:space:]]*//; s/[[:space:]]*\$//; s/^\([\"']\)\(.*\)\1\$/\2/"; }

# with_value FILE KEY VALUE: the text of FILE with that value, every other line as it is.
with_value() {
    local file=$1 number section
    [ -f "$file" ] || file=/dev/null
    number=$(line_of "$file" "$2")
    section=$(grep -n -m 1 '^[[:space:]]*\[[[:space:]]*telegram[[:space:]]*\]' "$file" | cut -d : -f 1)
    if [ -n "$number" ] && [ "$(value_of "$file" "$2")" = "$3" ]; then
        cat "$file"
    elif [ -n "$number" ]; then
        setting "$2" "$3" | sed -e "$number r /dev/stdin" -e "$number d" "$file"
    elif [ "$2" = bot_token ] && [ -n "$section" ]; then
        setting "$2" "$3" | sed "$section r /dev/stdin" "$file"
    else
        sed "\$a\\" "$file"  # ends the last line, if that is open
        [ "$2" != bot_token ] || echo '[telegram]'
        setting "$2" "$3"
    fi
}

# The line for a value. The program takes one pair of quotes off it, so a password that begins with one gets another pair.
setting() {
    case $1=$2 in
        bot_token=*) printf '%s = %s\n' "$1" "$2" ;;
        *=[\"\']*) printf "%s='%s'\n" "$1" "$2" ;;
        *) printf '%s=%s\n' "$1" "$2" ;;
    esac
}

# ---- put on: the firmware's config.ini -------------------------------------------------------------------------

# A config.ini that somebody else made there is theirs.
prepare_firmware() {
    local source=$firmware/config.ini word
    is_our_firmware || { [ -e "$source.template" ] && [ ! -e "$source" ]; } || return 0
    [ -e "$source" ] || source=$source.template
    word=$(value_of "$stage/config.ini" mote_token)  # what motes present instead of the real one
    with_value "$source" bot_token "${word:-$token}" >"$stage/firmware.ini"
    chown --reference="$source" "$stage/firmware.ini"
}

is_our_firmware() { whole_note "firmware${firmware//\//_}" >/dev/null || [ -e "$kept/firmware$firmware" ]; }

place_in_firmware() {
    is_our_firmware || keep "firmware${firmware//\//_}" "${firmware#/}/config.ini.template"
    place firmware.ini "$firmware/config.ini"
    rm -f "$firmware/config.ini.template"
}

# ---- put on: changes -------------------------------------------------------------------------------------------

# place NAME TARGET: makes TARGET what was prepared as NAME, if it was.
place() {
    local new=$stage/$1 target=$2
    if [ ! -e "$new" ]; then
        rm -f "$target"
    elif [ ! -L "$target" ] && cmp -s "$new" "$target" &&
        [ "$(stat -c %a:%u:%g "$new" "$target" | uniq | wc -l)" = 1 ]; then
        echo "$target: unchanged"
    else
        [ -d "${target%/*}" ] || mkdir -m 755 "${target%/*}"
        replace "$new" "$target"
        echo "$target: installed"
    fi
}

# replace SOURCE TARGET: whole or not at all.
replace() {
    cp -a "$1" "$2$part"
    sync "$2$part"
    mv -fT "$2$part" "$2"
}

# What happens at the next boot, now.
add_address() {
    local there word=unchanged
    ! systemctl is-active -q NetworkManager || nmcli connection reload
    [ -e "/sys/class/net/$interface" ] || return 0
    ip link set dev "$interface" up
    there=$(address_there "$address" "$interface")
    if [[ ! $there || $there == *tentative* ]]; then
        word=added
        [ -z "$there" ] || ip -6 addr del "$address" dev "$interface"  # so that the kernel asks for its other owner anew
        ip -6 addr add "$address" dev "$interface" || true
        for _ in {1..10}; do
            there=$(address_there "$address" "$interface")
            [[ $there == *tentative* && $there != *dadfailed* ]] || break
            sleep 0.3
        done
        [[ $there != *dadfailed* ]] || is_duplicate=true
    fi
    [ ! -e "$stage/connection" ] || $is_duplicate ||
        nmcli -w 15 connection up coap_websocket ifname "$interface" >/dev/null 2>&1 || true
    echo "$address on $interface: $word"
}

# Unless it was there before.
drop_address() {
    local there
    there=$(address_there "$1" "$2" | awk '{ print $2, $4 }')
    [ -d "$stage/before" ] || unpack_notes "$stage/before"
    ! grep -qxF "$there" "$stage/before/$facts/addresses" 2>/dev/null || return 0
    [ -z "$there" ] || ip -6 addr del "$1" dev "$2"
}

# Prints ip's line about that address on that interface, if it is there.
address_there() { [ -z "$1" ] || ip -6 -o addr show dev "$2" to "${1%/*}" 2>/dev/null | head -n 1; }

start() {
    local said works=true fault='' dead="the service does not run; it says why: sudo journalctl -u coap_websocket -n 20"
    systemctl daemon-reload
    systemctl -q enable coap_websocket
    systemctl restart coap_websocket 2>/dev/null || die "$dead"
    echo "service: enabled and restarted"
    await_service || fault=$(why_it_waits)
    echo "gateway: $(status)"
    echo
    # With the service's files, and without what root has in its environment.
    said=$(cd / && env -i PATH="$PATH" "$binary" check 2>&1) || works=false
    printf '%s\n' "$said" '' 'Watch it:   sudo systemctl status coap_websocket' \
        '            sudo journalctl -fu coap_websocket'
    systemctl is-active -q coap_websocket || die "$dead"
    [ -e "/sys/class/net/$interface" ] || echo "
$interface is not plugged in; once it is, the gateway serves. These are there: $(cd /sys/class/net && echo *).
If one of them is the motes': sudo bash setup.sh --interface NAME"
    [ -z "$fault" ] || die "$fault"
    $works || case $said in
        *" 401"* | *" 404"*) die "Telegram does not know this token; give it another: sudo bash setup.sh --token-file -" ;;
        *) die "installed and running, but see what the check says above; then run this again" ;;
    esac
}

status() { systemctl show -P StatusText coap_websocket; }

# Waits until the gateway serves; but not for an interface.
await_service() {
    local left=30
    $is_duplicate && return 1
    while [ -e "/sys/class/net/$interface" ] && [[ $(status) != "Serves CoAP on "* ]]; do
        [ $((left -= 1)) -gt 0 ] || return 1
        sleep 0.5
    done
}

why_it_waits() {
    if $is_duplicate; then
        echo "another host on $interface has $address, too; for another one: sudo bash setup.sh --address fd00:1234::1/64"
    elif [[ $(ip -o link show dev "$interface") != *LOWER_UP* ]]; then
        echo "$interface has no link: does the device at its other end run? Then plug it in again"
    elif [ "$(cat "/proc/sys/net/ipv6/conf/$interface/disable_ipv6")" = 1 ]; then
        echo "IPv6 is switched off on $interface: take disable_ipv6 out of /etc/sysctl.conf and /etc/sysctl.d, then reboot"
    else
        echo "the gateway does not serve, see above; $interface: $(ip -6 -br addr show dev "$interface" | xargs)"
    fi
}

# ---- take away -------------------------------------------------------------------------------------------------

take_away() {
    local before=$stage/before note
    if ! whole_note before >/dev/null && ! has_our_lines; then
        echo "Nothing to uninstall: setup.sh has installed nothing here."
        return
    fi
    keep_what_is_there
    unpack_notes "$before"
    systemctl stop coap_websocket 2>/dev/null || true
    systemctl reset-failed coap_websocket 2>/dev/null || true
    echo "service: stopped"

    drop_address "$old_address" "$old_interface"
    give_back_rc_local "$before$rc_local"
    give_back_templates "$before"
    rm -rf "${places[@]}" "${places[@]/%/$part}"
    echo "coap_websocket and its files: removed"
    note=$(whole_note before)
    tar -C / --numeric-owner --exclude="${rc_local#/}" --exclude="$facts" -xpf "$note"
    echo "what was there before: restored"

    systemctl daemon-reload
    ! systemctl is-active -q NetworkManager || nmcli connection reload
    [ ! -e "$before/$facts/active" ] || systemctl start coap_websocket
    sync
    rm -rf "$kept"
    echo "coap_websocket is gone."
}

# give_back_rc_local WAS: as it was, or as somebody has edited it since, but without our lines.
give_back_rc_local() {
    local was=$1
    rm -f "$rc_local$part"
    [ -f "$rc_local" ] || return 0
    cp -a "$rc_local" "$stage/edited"
    without_our_lines "$rc_local" >"$stage/edited"
    if [ -e "$was" ]; then cp -aT "$was" "$stage/was"; else new_rc_local "$stage/was"; fi
    with_our_lines "$stage/was" >"$stage/installed"
    if ! without_our_lines "$stage/installed" | cmp -s - "$stage/edited"; then
        [ ! -e "$was" ] || chmod --reference="$was" "$stage/edited"
        replace "$stage/edited" "$rc_local"
        echo "$rc_local: freed of our lines"
    elif [ -e "$was" ]; then
        replace "$was" "$rc_local"
    else
        rm "$rc_local"
        echo "$rc_local: removed"
    fi
}

# give_back_templates FOLDER: the firmware's as they were, or with what was edited in config.ini since, but without the token.
give_back_templates() {
    local was template config
    for was in "$1"/**/config.ini.template; do
        template=${was#"$1"}
        config=${template%.template}
        rm -f "$config$part" "$template$part"
        [ -e "$config" ] || continue
        cp -a "$was" "$stage/template"
        if ! with_value "$was" bot_token "$(value_of "$config" bot_token)" | cmp -s - "$config"; then
            with_value "$config" bot_token "$(value_of "$was" bot_token)" >"$stage/template"
        fi
        replace "$stage/template" "$template"
        rm "$config"
        echo "$template: restored"
    done
}

main "$@"
