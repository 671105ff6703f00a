#!/usr/bin/env bash
# Puts coap_websocket on a Raspberry Pi, or takes it away without a trace: sudo bash setup.sh [OPTION]...
#
#   --address ADDR/LEN   IPv6 address of the gateway (2001:470:7347:c810::1234/64)
#   --interface IF       network interface of the motes (usb0)
#   --token-file F       the bot token is the first line of F; "-" asks for a new one
#   --password-file F    the same for the password of the bot's config messages
#   --uninstall          put everything back as it was before the first run
#   --help
#
# Without these files the token and the password come from the environment (BOT_TOKEN, PASSWORD), else from the last
# installation or the program before it (../src), else they are asked for. Address and interface stay as last set.

# put_on checks, asks for and prepares all but the firmware's file in a private folder ($stage) before its first change.
# What is there before that change is kept as notes ($kept), from which take_away puts it back. A note is on the disk
# before anything relies on it, and every file is replaced by one rename. So it may be interrupted anywhere: run it
# again, or uninstall.

[ -n "${BASH_VERSION:-}" ] || { echo "setup.sh: this needs bash: sudo bash setup.sh" >&2; exit 1; }
set -eu
shopt -s nullglob globstar dotglob
umask 077
export LC_ALL=C.UTF-8

# What is installed, and from where.
here=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]:-.}")" && pwd)
firmware=$(readlink -m "$here/../src")
binary=/usr/local/bin/coap_websocket
unit=/etc/systemd/system/coap_websocket.service
etc=$(readlink -m /etc/coap_websocket)  # it may be a link
connection=/etc/NetworkManager/system-connections/coap_websocket.nmconnection
udev_rule=/etc/udev/rules.d/90-coap_websocket.rules
rc_local=$(readlink -m /etc/rc.local)   # so may this
places=("$binary" "$unit" "$unit.d" "$etc" "$connection" "$udev_rule" /var/{lib,log}/{,private/}coap_websocket
    /etc/systemd/system/*.wants/coap_websocket.service)  # all but rc.local and the firmware's config.ini

# How it is done.
kept=/var/lib/coap_websocket-setup  # the notes: what was there before
stage=$kept/stage                   # what this run prepares; not in /tmp or /run, where programs may not run
before=$stage/before                # the notes, unpacked
facts=coap_websocket-facts          # in the notes: addresses, and whether the service ran
part=.coap_websocket-new            # ends the name of a file that is being written
mark='  # coap_websocket'           # ends our lines, in rc.local and elsewhere
off='# coap_websocket: '            # begins a line of somebody else's there that is commented out
bom='\xef\xbb\xbf'                  # may begin a text file
placeholder=your_telegram_bot_token # stands for the token in the firmware's template
section="^($bom)?\s*\[\s*telegram\s*\]"  # the only one of config.ini that counts

# What a run is told and finds out.
explained=false                  # has the fault that ends this run been named?
address='' interface=''          # asked for; then those that the gateway gets
old_address='' old_interface=''  # what the last run gave the Pi
token_file='' password_file=''
token='' password=''
reply=''                         # what choose has found
before_note=''                   # the note of what was there, if one is whole; the firmware has its own
fault=''                         # why the gateway does not serve, though all is installed

main() {
    local uninstall=false lock folder
    while [ $# -gt 0 ]; do
        case $1 in
            --help) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; return ;;
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
    for folder in /usr/local /etc /var/lib; do
        [ -w "$folder" ] || die "cannot write to $folder: is its file system read-only?"
    done
    trap finish EXIT
    trap 'exit 130' INT TERM HUP
    rm -rf "$stage"
    mkdir -p "$stage" 2>/dev/null || die "cannot write to /var/lib: is the disk full?"
    unpack_notes
    read -r _ _ _ _ old_address _ old_interface _ < <(our_lines | grep -o 'ip -6 addr add .*') || true
    if $uninstall; then take_away; else put_on; fi
}

die() {
    explained=true
    printf 'setup.sh: %s\n' "$*" >&2
    exit 1
}

finish() {
    local status=$?
    rm -rf "$stage"
    rmdir "$kept" 2>/dev/null || true  # succeeds only without a note: then nothing was changed
    [ $status = 0 ] || $explained ||
        echo "setup.sh: stopped before the end; mend what was said above, then run the same command again" >&2
}

# ---- notes -----------------------------------------------------------------------------------------------------

# Before the first change. If the notes were lost, all that we know is that our lines were not there.
keep_what_is_there() {
    local paths=()
    [ "$(stat -f -c %T /)" != overlayfs ] ||
        echo "warning: the root file system is an overlay: unless that is switched off, nothing of this outlasts a reboot"
    [ -z "$before_note" ] || return 0
    mkdir "$stage/$facts"
    if [ -n "$(our_lines)" ]; then
        echo "$kept: damaged; what was there before the first run cannot be restored any more"
    else
        ip -6 -o addr show | awk '{ print $2, $4 }' >"$stage/$facts/addresses"
        ! systemctl is-active -q coap_websocket || touch "$stage/$facts/active"
        mapfile -t paths < <(cd / && find "${places[@]#/}" "${rc_local#/}" -maxdepth 0 2>/dev/null)
    fi
    keep before "${paths[@]}" -C "$stage" "$facts"
    before_note=$kept/before.tar.gz
}

# One that adds the address stands in each of these files, for one may get lost.
our_lines() { grep -ahs "$mark\$" "$rc_local" "$connection" "$udev_rule"; }

# keep NAME PATH... (and tar's -C): keeps files as a note, twice, for one may get lost.
keep() {
    local note=$kept/$1.tar.gz status=0
    tar -C / --numeric-owner --no-unquote --warning=no-file-changed -czf "$stage/note" "${@:2}" || status=$?
    [ $status -le 1 ] || die "cannot write to $kept: is the disk full?"  # 1: a file changed meanwhile, such as a log
    replace "$stage/note" "$note.copy"
    replace "$stage/note" "$note"
    sync "$kept" /var/lib
}

# Unpacks the notes that are whole.
unpack_notes() {
    local note
    mkdir -p "$before/$facts"
    for note in "$kept"/*.tar*; do
        if [ ! -s "$note" ] || ! tar -tf "$note" >/dev/null 2>&1; then continue; fi
        tar -C "$before" --numeric-owner -xpf "$note"
        [[ $note != */before.tar* ]] || before_note=$note
    done
    # Version 1.0 kept these as files.
    cp "$kept"/{addresses,active} "$before/$facts" 2>/dev/null || true
    cp -a "$kept/firmware/." "$before" 2>/dev/null || true
}

# ---- put on ----------------------------------------------------------------------------------------------------

put_on() {
    export -n BOT_TOKEN PASSWORD  # not for our children
    [ -e "$firmware/config.ini" ] || [ ! -e "$firmware/config.ini.template" ] || [ -w "$firmware" ] ||
        die "cannot write to $firmware: copy the folder of this setup.sh out of there, and run it in the copy"
    prepare_unit_and_binary
    prepare_settings
    prepare_rc_local
    prepare_interface

    keep_what_is_there
    place binary "$binary"
    grep -qs '^LoadCredential=' "$unit" || rm -rf "$unit.d"  # not our unit: its drop-ins go with it
    place unit "$unit"
    place config.ini "$etc/config.ini"
    place env "$etc/.env"
    place_in_firmware
    [ "$old_address $old_interface" = "$address $interface" ] || drop_address
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
    [ -x "$stage/binary" ] || die "programs may not run in /var/lib: is it mounted noexec?"
    # By bash: timeout itself would run a program for another machine as a shell script.
    said=$(timeout 10 bash -c "$stage/binary --version" 2>&1 </dev/null) || true
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
    printf '%s\n' "addr add $1 dev lo" "addr show dev lo scope global" |
        unshare --net ip -6 -o -batch - 2>/dev/null | awk '{ print $4 }'
}

# Our lines come right behind the shebang, before any exit, and cannot fail: that would end a script under -e.
prepare_rc_local() {
    local theirs=$stage/rc.local.theirs new=$stage/rc.local
    if ! theirs_of "$rc_local" >"$theirs" 2>/dev/null || LC_ALL=C grep -aqP '\0|\r$' "$theirs" ||
        ! head -n 1 "$theirs" | grep -Eq '^#! *(/usr)?/bin/(env +)?(ba|da)?sh( .*)?$'; then
        die "$rc_local is not a shell script: move it away, then run this again"
    fi
    if [ -e "$rc_local" ]; then cp -aT "$rc_local" "$new"; else touch "$new"; fi
    [ -x "$new" ] || chmod 755 "$new"  # else it never runs
    printf "%s$mark\n" "sleep 1" "ip link set dev $interface up || true" "ip -6 addr add $address dev $interface || true" |
        sed -e "$(lines_that_add_it "$theirs")" -e '1r /dev/stdin' "$theirs" >"$new"
    # Half a command commented out would make the next one its other half.
    if grep -aPzq "(?m)^(?!\\s*#).*([\\\\|]|&&)[ \\t]*\\n$off" "$new" ||
        { bash -n "$theirs" 2>/dev/null && ! bash -n "$new" 2>/dev/null; }; then
        die "$rc_local adds $address in a way that cannot be commented out: remove that there, then run this again"
    fi
}

# Prints what is not ours in an rc.local, as a script of its own.
theirs_of() {
    if [ ! -e "$1" ]; then printf '%s\n' '#!/bin/sh' 'exit 0'; return; fi
    [ -f "$1" ] || return
    [ "$(head -c 2 "$1")" = '#!' ] || echo '#!/bin/sh'
    sed -e "/$mark\$/d" -e "s/^$off//" "$1"
}

# Prints for sed how to comment out, once, each line that adds the address, in whatever spelling, with the lines that
# continue it: the second one to add an address fails.
lines_that_add_it() {
    local range line word start='^\s*([^#[:space:]].*[^[:alnum:]_-])?' ifconfig='ifconfig\s[^;&|]*\sadd\s'
    local ip='ip\s+([^;&|]*\s)?a[a-z]*\s+[acr][a-z]*\s'
    grep -anE "$start($ip|$ifconfig)" "$1" | while IFS=: read -r range line; do
        [[ $line != *\\ ]] || range="$range,/^\$\|[^\\]\$/"
        while read -r word; do
            [ "$(as_the_kernel_spells "$word")" != "${address%/*}/128" ] || echo "$range s/^\($off\)\?/$off/"
        done < <(grep -oE '[[:xdigit:]]*:[[:xdigit:]:]+' <<<"$line")
    done
}

# NetworkManager takes away an address that it does not know. Where it does not look after the interface, nobody else
# brings that up when it appears.
prepare_interface() {
    local device there ip add="-6 addr add $address dev $interface"
    ip=$(command -v ip)
    device=$(nmcli -g GENERAL.TYPE,GENERAL.STATE device show "$interface" 2>/dev/null) || true  # none if it is absent
    if systemctl is-active -q NetworkManager && [[ -z $device || ($device == ethernet* && $device != *unmanaged*) ]]; then
        [ -z "$(ip -4 route show default dev "$interface" 2>/dev/null)" ] || die "$interface is this Pi's way to the Internet," \
            "and would lose that; name the motes' interface: sudo bash setup.sh --interface NAME"
        there=$(ip -4 -br addr show dev "$interface" 2>/dev/null | awk '{ print $3 }')
        [ -z "$there" ] || echo "warning: $interface loses $there, for it is the motes' alone now;" \
            "if it is not theirs: sudo bash setup.sh --uninstall"
        printf '%s\n' "# ip $add$mark" \
            '[connection]' id=coap_websocket type=ethernet "interface-name=$interface" autoconnect-priority=10 '' \
            '[ipv4]' method=disabled '' '[ipv6]' method=manual "address1=$address" >"$stage/connection"
    elif [ -d "${udev_rule%/*}" ]; then
        printf '# %s\nACTION=="add|move", SUBSYSTEM=="net", KERNEL=="%s", RUN+="%s", RUN+="%s"\n' "ip $add$mark" \
            "$interface" "$ip link set dev $interface up" "$ip $add" >"$stage/udev_rule"
        chmod 644 "$stage/udev_rule"
    fi
}

# ---- put on: settings ------------------------------------------------------------------------------------------

# What somebody wrote into .env by hand as address stays until another one is asked for.
prepare_settings() {
    local listen=''
    [ -n "$address" ] || listen=$(value_of "$etc/.env" COAP_SERVER_IP)  # none was asked for
    choose_address
    choose "bot token" "as BotFather shows it" "$token_file" "${BOT_TOKEN:-}" \
        "$(value_of "$etc/config.ini" bot_token)" "$(value_of "$firmware/config.ini" bot_token)"
    token=$reply
    choose password "8 characters or more, no blanks" "$password_file" "${PASSWORD:-}" \
        "$(value_of "$etc/.env" PASSWORD)" "$(value_of "$firmware/.env" PASSWORD)" "$(value_of "$here/.env" PASSWORD)"
    password=$reply
    [ ${#password} -ge 8 ] || die "the password needs 8 characters or more; another one: sudo bash setup.sh --password-file -"
    with_line "$etc/config.ini" bot_token "bot_token = $token" >"$stage/config.ini"
    with_line "$etc/.env" PASSWORD "PASSWORD=\"$password\"" >"$stage/env.password"
    with_line "$stage/env.password" COAP_SERVER_IP "COAP_SERVER_IP=${listen:-${address%/*}}" >"$stage/env"
    judge_settings
    [[ ! $password =~ (--|\*\*|__|~~|'||'|'<<'|'>>'|'...'|'`') ]] ||
        echo "warning: Telegram's apps rewrite ${BASH_REMATCH[1]} while it is typed; a password without it: --password-file -"
}

# choose WHAT HINT FILE VALUE...: sets reply from FILE, else to the first VALUE that holds one, else to what is typed.
choose() {
    local what=$1 hint=$2 file=$3 value
    reply=''
    if [ -z "$file" ]; then
        for value in "${@:4}"; do reply=${reply:-${value#"$placeholder"}}; done
    elif [ "$file" != - ]; then
        reply=$(head -n 1 "$file" 2>/dev/null | tr -d '\0' | bare)
        [ -n "${reply#"$placeholder"}" ] ||
            die "--${what#* }-file names no file that begins with the $what: write it there as the first line, then run this again"
    fi
    [ -z "$reply" ] || return 0
    [ -t 0 ] || die "no $what and no terminal to ask for it: write it to a file, then run this with --${what#* }-file FILE"
    read -rsp "${what^} ($hint; it is not shown): " reply || true
    echo >&2
    [ -n "${reply#"$placeholder"}" ] || die "no $what: nothing was changed"
}

# The program decides whether it would start with these settings.
judge_settings() {
    local said status=0
    said=$(cd / && env -i PATH="$PATH" CREDENTIALS_DIRECTORY="$stage" "$stage/binary" check --settings 2>&1) || status=$?
    [ $status -le 1 ] || die "the coap_websocket beside this setup.sh is older than it: build it anew"
    said=${said##*$'\n'coap_websocket: } said=${said//"$stage/env"/"$etc/.env"} said=${said//"$stage"/"$etc"}
    [ $status = 0 ] || die "${said#coap_websocket: }: mend it or give another, then run this again; nothing was changed"
}

# to_line KEY COMMAND: sed's script that does COMMAND to the line that sets KEY; tokens stand under [telegram].
to_line() {
    case $1 in
        *_token) printf '%s' "/$section/I,/^\s*\[/{/^\s*$1\s*=/I$2}" ;;
        *) printf '%s' "/^($bom)?\s*(export\s+)?$1\s*=/$2" ;;
    esac
}

line_of() { [ ! -f "$1" ] || LC_ALL=C sed -nE "$(to_line "$2" p)" "$1" | tail -n 1; }

value_of() { line_of "$1" "$2" | LC_ALL=C sed 's/^[^=]*=//' | bare; }

# Takes a BOM, a carriage return, blanks and quotes off both ends of a line.
bare() { LC_ALL=C sed "s/^$bom//; s/^\s*//; s/\s*\$//; s/^\([\"']\)\(.*\)\1\$/\2/"; }

# with_line FILE KEY LINE: the text of FILE with that line to set KEY, every other line as it is. A line whose value is
# right stays as it is spelled.
with_line() {
    local file=$1 key=$2 line=$3
    [ -f "$file" ] || file=/dev/null
    if [ "$(value_of "$file" "$key")" = "$(printf %s "${line#*=}" | bare)" ]; then
        cat "$file"
    elif [ -n "$(line_of "$file" "$key")" ]; then
        printf '%s\n' "$line" | LC_ALL=C sed -E "$(to_line "$key" $'{r /dev/stdin\nd}')" "$file"
    elif [ "$key" = bot_token ] && LC_ALL=C grep -Piq "$section" "$file"; then
        printf '%s\n' "$line" | LC_ALL=C sed -E "/$section/Ir /dev/stdin" "$file"
    else
        sed "\$a\\" "$file"  # ends the last line, if that is open
        [ "$key" != bot_token ] || echo '[telegram]'
        printf '%s\n' "$line"
    fi
}

# ---- put on: changes -------------------------------------------------------------------------------------------

# place NAME TARGET: installs what was prepared as NAME; if nothing was, removes TARGET.
place() {
    local new=$stage/$1 target=$2 word=installed
    if [ ! -e "$new" ]; then rm -f "$target"; return; fi
    [ -L "$target" ] || ! cmp -s "$new" "$target" || word=unchanged
    [ -d "${target%/*}" ] || mkdir -m 755 "${target%/*}"
    replace "$new" "$target"  # even if unchanged, for its owner and mode
    echo "$target: $word"
}

# replace SOURCE TARGET: whole or not at all.
replace() {
    cp -aT --remove-destination "$1" "$2$part"
    sync "$2$part"
    mv -fT "$2$part" "$2"
}

# The template becomes config.ini. One that somebody else made there is theirs.
place_in_firmware() {
    local config=$firmware/config.ini template=$firmware/config.ini.template source word
    source=$config
    # Without a note of ours config.ini is somebody's own.
    if [ ! -e "$config" ]; then source=$template; elif [ ! -e "$before$template" ]; then return; fi
    [ -n "$(line_of "$source" bot_token)" ] || return 0
    word=$(value_of "$stage/config.ini" mote_token)  # what motes present instead of the real one
    with_line "$source" bot_token "bot_token = ${word:-$token}" >"$stage/firmware.ini"
    chown --reference="$source" "$stage/firmware.ini"
    [ -e "$before$template" ] || keep "firmware${firmware//\//_}" "${template#/}"
    place firmware.ini "$config"
    rm -f "$template"
}

# What happens at the next boot, now.
add_address() {
    local there word=unchanged
    ! systemctl is-active -q NetworkManager || nmcli connection reload
    [ -e "/sys/class/net/$interface" ] || return 0
    ip link set dev "$interface" up || true  # await_service tells what lacks
    there=$(address_there "$address" "$interface")
    # So that the kernel looks for a duplicate anew.
    [[ $there != *dadfailed* ]] || ip -6 addr del "$address" dev "$interface"
    if ip -6 addr add "$address" dev "$interface" 2>/dev/null; then word=added; fi
    for _ in {1..10}; do
        there=$(address_there "$address" "$interface")
        [[ $there == *tentative* && $there != *dadfailed* ]] || break
        sleep 0.3
    done
    echo "$address on $interface: $word"
    if [[ $there == *dadfailed* ]]; then
        fault="another host on $interface has $address, too; for another one: sudo bash setup.sh --address fd00:1234::1/64"
    elif [ -e "$stage/connection" ]; then
        nmcli -w 15 connection up coap_websocket ifname "$interface" >/dev/null 2>&1 || true
    fi
}

# The last run's, unless it was there before.
drop_address() {
    local there
    [ -n "$old_address" ] || return 0
    there=$(address_there "$old_address" "$old_interface" | awk '{ print $2, $4 }')
    [ -z "$there" ] || grep -qsxF "$there" "$before/$facts/addresses" || ip -6 addr del "$old_address" dev "$old_interface"
}

# Prints ip's line about that address on that interface, if it is there.
address_there() { ip -6 -o addr show dev "$2" to "${1%/*}" 2>/dev/null | head -n 1; }

start() {
    local said dead="the service does not run; it says why: sudo journalctl -u coap_websocket -n 20"
    systemctl daemon-reload
    systemctl -q enable coap_websocket
    systemctl restart coap_websocket 2>/dev/null || die "$dead"
    echo "service: enabled and restarted"
    [ -n "$fault" ] || [ ! -e "/sys/class/net/$interface" ] || await_service
    echo "gateway: $(status)"
    echo
    # With the service's files, and without what root has in its environment.
    if ! said=$(cd / && env -i PATH="$PATH" "$binary" check 2>&1) && [ -z "$fault" ]; then
        fault="installed and running, but see what the check says above; then run this again"
        [[ $said != *": 40"[14]" "* ]] || fault="Telegram does not know this token; another one: sudo bash setup.sh --token-file -"
    fi
    echo "$said"
    systemctl is-active -q coap_websocket || die "$dead"
    [ -e "/sys/class/net/$interface" ] || echo "
$interface is not plugged in; once it is, the gateway serves. These are there: $(cd /sys/class/net && echo *).
If one of them is the motes': sudo bash setup.sh --interface NAME"
    [ -z "$fault" ] || die "$fault"
}

status() { systemctl show -P StatusText coap_websocket; }

# Waits until the gateway serves, or finds out why it does not.
await_service() {
    for _ in {1..30}; do
        [[ $(status) != "Serves CoAP on "* ]] || return 0
        sleep 0.5
    done
    if [[ $(ip -o link show dev "$interface") != *LOWER_UP* ]]; then
        fault="$interface has no link: does the device at its other end run? Then plug it in again"
    elif [ "$(cat "/proc/sys/net/ipv6/conf/$interface/disable_ipv6")" = 1 ]; then
        fault="IPv6 is switched off on $interface: take disable_ipv6 out of /etc/sysctl.conf and /etc/sysctl.d, then reboot"
    else
        fault="the gateway does not serve, see above; $interface: $(ip -6 -br addr show dev "$interface" | xargs)"
    fi
}

# ---- take away -------------------------------------------------------------------------------------------------

take_away() {
    if [ -z "$before_note$(our_lines)" ]; then
        rm -rf "$kept"  # with notes that never got whole
        echo "Nothing to uninstall: setup.sh has installed nothing here."
        return
    fi
    keep_what_is_there  # anew, if the notes were lost
    systemctl stop coap_websocket 2>/dev/null || true
    systemctl reset-failed coap_websocket 2>/dev/null || true
    echo "service: stopped"

    drop_address
    give_back_rc_local
    give_back_templates
    rm -rf "${places[@]}" "${places[@]/%/$part}"  # and what was being written
    echo "coap_websocket and its files: removed"
    tar -C / --numeric-owner --exclude="${rc_local#/}" --exclude="$facts" -xpf "$before_note"
    echo "what was there before: restored"

    systemctl daemon-reload
    ! systemctl is-active -q NetworkManager || nmcli connection reload
    [ ! -e "$before/$facts/active" ] || systemctl start coap_websocket ||
        echo "the service that ran before does not start; it says why: sudo journalctl -u coap_websocket -n 20"
    sync
    rm -rf "$kept"
    echo "coap_websocket is gone."
}

# As it was, or as somebody has edited it since, but without our lines.
give_back_rc_local() {
    local was=$before$rc_local edited=$stage/edited
    rm -f "$rc_local$part"
    [ -f "$rc_local" ] || return 0
    if [ "$(theirs_of "$rc_local")" != "$(theirs_of "$was")" ]; then
        cp -a "$rc_local" "$edited"
        theirs_of "$rc_local" >"$edited"
        [ ! -e "$was" ] || chmod --reference="$was" "$edited"
        replace "$edited" "$rc_local"
        echo "$rc_local: freed of our lines"
    elif [ -e "$was" ]; then
        replace "$was" "$rc_local"
    else
        rm "$rc_local"
        echo "$rc_local: removed"
    fi
}

# The firmware's, as they were, or with what was edited in config.ini since, but without the token.
give_back_templates() {
    local was template config
    for was in "$before"/**/config.ini.template; do
        template=${was#"$before"}
        config=${template%.template}
        rm -f "$config$part" "$template$part"
        [ -d "${config%/*}" ] || continue
        if [ -e "$template" ] && [ ! -e "$config" ]; then continue; fi  # is back already
        cp -a "$was" "$stage/template"
        if [ -e "$config" ] && [ "$(with_line "$was" bot_token "$(line_of "$config" bot_token)")" != "$(cat "$config")" ]; then
            with_line "$config" bot_token "$(line_of "$was" bot_token)" >"$stage/template"  # edited since
        fi
        replace "$stage/template" "$template"
        rm -f "$config"
        echo "$template: restored"
    done
}

main "$@"
