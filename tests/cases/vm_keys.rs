//! Where private keys are, and where they are not: nowhere but in files of mode 0600 below the run directory's `keys`, and in
//! the kernel. And how long they serve: an association is never installed twice, and one that has protected enough is
//! replaced.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_overlay::keys::PrivateKey;
use husk_tests::kernel::{self, Part};
use husk_tests::load::{Rate, while_knocking};
use husk_tests::pod::await_answers_among;
use husk_tests::process::{self, Program};
use husk_tests::rotation::{newest, published, rotate};
use husk_tests::secret::forms;
use husk_tests::{Cluster, ClusterBuilder, Host, Leak, Load, Mode, Pod, Signal, eventually, xfrm};

/// How long what a daemon does by itself may take.
const SOON: Duration = Duration::from_secs(8);

/// How long an answer may be under way.
const ANSWER: Duration = Duration::from_millis(100);

/// A secret of the cluster, which nobody may find again either.
const SECRET: &str = "correct horse battery staple of the cluster";
const SECRET_FILE: &str = "/etc/husk/secret";

/// What the daemon's folder of keys is called.
const KEYS: &str = "/run/husk/keys";

fn start(builder: ClusterBuilder) -> Result<Cluster> {
    let cluster = builder.set("keys.grace", 1).set("keys.hardLifetime", 600).build()?;
    for host in cluster.hosts() {
        host.write_secret(SECRET_FILE, SECRET)?;
    }
    cluster.start()?;
    Ok(cluster)
}

fn pods(cluster: &Cluster) -> Result<Vec<Pod>> {
    let pods = cluster.add_pods("p")?;
    await_answers_among(&pods, SOON)?;
    Ok(pods)
}

/// Every file below a directory, links not followed.
fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            found.extend(files(&entry.path())?);
        } else if kind.is_file() {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// How often key files are read again that a daemon has replaced meanwhile.
const ATTEMPTS: usize = 3;

/// The private keys of a host, out of its files: whatever there is in them that the host's published keys belong to, or that
/// looks like a key and belongs to nothing that is published yet. The daemon may replace a file while they are read: then they
/// are read again.
fn private_keys(cluster: &Cluster, number: usize) -> Result<Vec<PrivateKey>> {
    let replaced = |error: &anyhow::Error| {
        error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::NotFound)
    };
    for _ in 0..ATTEMPTS {
        match read_private_keys(cluster, number) {
            Err(error) if replaced(&error) => {}
            read => return read,
        }
    }
    read_private_keys(cluster, number)
}

fn read_private_keys(cluster: &Cluster, number: usize) -> Result<Vec<PrivateKey>> {
    let host = cluster.host(number);
    let folder = host.file(KEYS);
    ensure!(mode(&folder)? == 0o700, "{} has mode {:o}", folder.display(), mode(&folder)?);
    let mut keys = Vec::new();
    for path in files(&folder)? {
        ensure!(mode(&path)? == 0o600, "{} has mode {:o}", path.display(), mode(&path)?);
        let text = fs::read_to_string(&path)?;
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && !"+/=".contains(c));
        keys.extend(words.filter_map(|word| PrivateKey::from_base64(word).ok()));
    }
    let published: BTreeSet<_> = published(cluster, number)?.into_values().collect();
    // A file may name the public half beside the private one.
    keys.retain(|key| !published.iter().any(|public| public.as_bytes() == key.expose()));
    let known: BTreeSet<_> = keys.iter().map(PrivateKey::public).collect();
    ensure!(published.is_subset(&known), "of host{number}'s keys {published:?} not all are in {}", folder.display());
    Ok(keys)
}

fn mode(path: &Path) -> Result<u32> {
    Ok(fs::symlink_metadata(path)?.permissions().mode() & 0o7777)
}

/// Looks for secrets in something that has a name.
struct Search {
    /// By first byte: most bytes of what is searched begin none.
    forms: BTreeMap<u8, Vec<Vec<u8>>>,
    searched: usize,
}

impl Search {
    fn of<'a>(secrets: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut by_first: BTreeMap<u8, Vec<Vec<u8>>> = BTreeMap::new();
        for form in secrets.into_iter().flat_map(forms) {
            by_first.entry(form[0]).or_default().push(form);
        }
        Self { forms: by_first, searched: 0 }
    }

    fn look(&mut self, what: &str, bytes: &[u8]) -> Result<()> {
        self.searched += bytes.len();
        let table: [&[Vec<u8>]; 256] = std::array::from_fn(|first| {
            u8::try_from(first).ok().and_then(|it| self.forms.get(&it)).map_or(&[][..], |it| it)
        });
        let at = |start: usize| table[usize::from(bytes[start])].iter().find(|form| bytes[start..].starts_with(form));
        let found = (0..bytes.len()).find_map(at);
        ensure!(found.is_none(), "{what} holds a secret: {:?}", found.map(|form| String::from_utf8_lossy(form)));
        Ok(())
    }
}

/// The bytes of a key that `ip` prints in hexadecimal digits.
fn bytes_of(hex: &str) -> Result<Vec<u8>> {
    (0..hex.len()).step_by(2).map(|at| Ok(u8::from_str_radix(&hex[at..at + 2], 16)?)).collect()
}

#[test]
fn a_secret_is_found_in_every_form() -> Result<()> {
    // Both digits of base64 that depend on the alphabet are in this key.
    let key = PrivateKey::from_random([0xfb; 32])?;
    let mut search = Search::of([&key.expose()[..]]);
    search.look("nothing", &[0xfb; 31])?;
    let debug = format!("{:?}", key.expose());
    let hex: Vec<String> = key.expose().iter().map(|byte| format!("{byte:02x}")).collect();
    let base64 = key.to_base64();
    ensure!(base64.contains('+') && base64.contains('/'), "another key is needed");
    let url = base64.trim_end_matches('=').replace('+', "-").replace('/', "_");
    let (packed, upper, spaced) = (hex.concat(), hex.join(":").to_uppercase(), hex.join(" "));
    let written = [base64.as_str(), &url, &debug, &packed, &upper, &spaced].map(str::as_bytes);
    for text in written.into_iter().chain([&key.expose()[..]]) {
        ensure!(search.look("it", &[b"before ", text, b" after"].concat()).is_err(), "{text:?} was not found");
    }
    Ok(())
}

#[test]
fn secrets_are_in_their_files_and_nowhere_else() -> Result<()> {
    kernel::require(&[Part::Esp, Part::Wireguard])?;
    for mode in [Mode::Wireguard, Mode::Ipsec] {
        let builder = Cluster::builder().mode(mode).set("log.level", "trace");
        let cluster = start(builder.set("ipsec.presharedKeyFile", SECRET_FILE))?;
        let _pods = pods(&cluster)?;
        let mut secrets: Vec<Vec<u8>> = vec![SECRET.as_bytes().to_owned()];
        let note = |secrets: &mut Vec<Vec<u8>>| -> Result<()> {
            for (number, host) in (1..).zip(cluster.hosts()) {
                secrets.extend(private_keys(&cluster, number)?.iter().map(|key| key.expose().to_vec()));
                for state in xfrm::states(host.netns())? {
                    secrets.push(bytes_of(state.key.as_deref().unwrap_or_default())?);
                }
            }
            Ok(())
        };
        note(&mut secrets)?;
        rotate(&cluster, &[1, 2], SOON)?;
        note(&mut secrets)?;
        // The other daemon may die of something at any time.
        cluster.host(1).restart_daemon(Signal::SIGTERM)?;
        let mut search = Search::of(secrets.iter().map(Vec::as_slice));
        ensure!(secrets.len() > 4, "{mode}: only {} secrets", secrets.len());
        for host in cluster.hosts() {
            everywhere(host, &mut search).with_context(|| format!("{mode}, {}", host.name()))?;
        }
        for path in files(&cluster.manifests())? {
            search.look(&path.display().to_string(), &fs::read(&path)?)?;
        }
        core_dump(cluster.host(2), &mut search).context(mode)?;
        eprintln!("{mode}: {} secrets, {} bytes searched", secrets.len(), search.searched);
        ensure!(search.searched > 10_000, "{mode}: only {} bytes were searched", search.searched);
    }
    Ok(())
}

fn everywhere(host: &Host, search: &mut Search) -> Result<()> {
    for command in [&["status"][..], &["peers"], &["mtu"], &["diff"], &["keys", "status"], &["ipam", "show"]] {
        for form in ["table", "json"] {
            let output = host.huskctl(command.iter().copied().chain(["--output", form]))?;
            let said = output.stdout + &output.stderr;
            ensure!(!said.is_empty(), "`huskctl {command:?}` says nothing");
            search.look(&format!("the answer of `huskctl {}`", command.join(" ")), said.as_bytes())?;
        }
    }
    // What is given away to those who are to help, the associations of IPsec among it.
    const BUNDLE: &str = "/var/lib/husk/bundle.tar.gz";
    let huskctl = host.program(process::binary("huskctl")?);
    huskctl.args(["support-bundle", "--file", BUNDLE]).limit(Duration::from_secs(120)).check()?;
    let bundle = Program::new("gzip").args([Path::new("-dc"), &host.file(BUNDLE)]).check()?;
    ensure!(
        bundle.contains("network/tunnels-xfrm.txt") && bundle.contains("network/wireguard.txt"),
        "{BUNDLE} is not whole"
    );
    search.look(BUNDLE, bundle.as_bytes())?;
    // The log of the daemon is in there too.
    let root = host.file("/");
    // Nor does the plugin's program, which is large, hold any secret.
    let own = [host.file(KEYS), host.file(SECRET_FILE), host.file("/opt/cni/bin")];
    for path in files(&root)?.into_iter().filter(|path| own.iter().all(|own| !path.starts_with(own))) {
        search.look(&path.display().to_string(), &fs::read(&path)?)?;
    }
    for process in host.processes() {
        for file in ["cmdline", "environ"] {
            let bytes = fs::read(format!("/proc/{}/{file}", process.pid)).unwrap_or_default();
            search.look(&format!("{file} of {}", process.command), &bytes)?;
        }
    }
    Ok(())
}

/// A daemon that crashes leaves no image of its memory, or one without secrets. The kernel is told to write images, as some
/// distributions do; it is this machine's own.
fn core_dump(host: &Host, search: &mut Search) -> Result<()> {
    const PATTERN: &str = "/proc/sys/kernel/core_pattern";
    let before = fs::read(PATTERN)?;
    let directory = std::env::temp_dir();
    fs::write(PATTERN, directory.join("husk-core.%p").to_string_lossy().as_bytes())?;
    let done = crash(host, &directory, search);
    fs::write(PATTERN, before)?;
    done
}

fn crash(host: &Host, directory: &Path, search: &mut Search) -> Result<()> {
    // A program that does nothing against it leaves one, or nothing is proven.
    let control = "ulimit -c unlimited; sleep 60 & kill -ABRT $!; wait $!; test -e husk-core.$!; rm husk-core.$!";
    Program::new("bash").args(["-c", &format!("cd {} && {{ {control}; }}", directory.display())]).check()?;
    let daemon = host.processes().into_iter().find(|process| process.command.contains("huskd run"));
    let pid = daemon.context("no daemon")?.pid;
    Program::new("prlimit").args(["--core=unlimited", &format!("--pid={pid}")]).check()?;
    host.stop_daemon(Signal::SIGABRT)?;
    let core = directory.join(format!("husk-core.{pid}"));
    if core.exists() {
        let image = fs::read(&core)?;
        fs::remove_file(&core)?;
        search.look("the image of the daemon's memory", &image)?;
    }
    Ok(())
}

#[test]
fn a_restart_of_the_daemon_installs_nothing_twice() -> Result<()> {
    kernel::require(&[Part::Esp])?;
    for mode in [Mode::Ipsec, Mode::VxlanIpsec] {
        let cluster = start(Cluster::builder().mode(mode))?;
        let pods = pods(&cluster)?;
        let load = Load::among(&[&pods[0], &pods[1]], Rate::default())?;
        let look = || -> Result<BTreeMap<u32, _>> {
            let states = xfrm::states(cluster.host(1).netns())?;
            Ok(states.into_iter().map(|state| (state.spi, (state.key, state.added, state.packets))).collect())
        };
        let before = look()?;
        for signal in [Signal::SIGTERM, Signal::SIGKILL] {
            cluster.host(1).restart_daemon(signal)?;
            let after = look()?;
            for (spi, (key, added, packets)) in &before {
                let (same_key, same_time, more) =
                    after.get(spi).with_context(|| format!("{mode}: {spi:#x} is gone"))?;
                ensure!((key, added) == (same_key, same_time), "{mode}: {spi:#x} was installed again");
                ensure!(more >= packets, "{mode}: {spi:#x} counts {more} packets after {packets}");
            }
        }
        load.stop()?.exact().context(mode)?;
    }
    Ok(())
}

/// What somebody removes on the first host while nobody looks.
const FLUSHES: [&str; 2] = ["ip xfrm state flush", "ip xfrm state flush; ip xfrm policy flush"];

#[test]
fn associations_lost_while_the_daemon_was_dead_are_never_keyed_alike_again() -> Result<()> {
    kernel::require(&[Part::Esp])?;
    for mode in [Mode::Ipsec, Mode::VxlanIpsec] {
        let cluster = Cluster::builder().mode(mode).set("keys.grace", 1).set("keys.hardLifetime", 600).build()?;
        let leak = Leak::watch(&cluster)?;
        cluster.start()?;
        let pods = pods(&cluster)?;
        let keys = |number: usize| -> Result<BTreeSet<String>> {
            Ok(xfrm::states(cluster.host(number).netns())?.into_iter().filter_map(|state| state.key).collect())
        };
        let mut seen = keys(1)?;
        ensure!(seen.len() >= 2, "{mode}: {} keys", seen.len());
        for flush in FLUSHES {
            seen.extend(keys(2)?);
            let first = cluster.host(1);
            first.stop_daemon(Signal::SIGKILL)?;
            first.program("sh").args(["-c", flush]).check()?;
            ensure!(keys(1)?.is_empty(), "{mode}: the kernel has associations after `{flush}`");
            // What the pods send in the meantime goes nowhere, and not in plaintext either.
            while_knocking(&[pods[0].netns()], &pods[1].addresses(), || {
                first.start_daemon()?;
                // From the first association on: what was there for a moment was there.
                eventually("traffic to flow again", SOON, || {
                    let again = keys(1)?.intersection(&seen).count();
                    ensure!(again == 0, "{mode}: {again} keys are in the kernel again after `{flush}`");
                    Ok(pods[0].reaches(&pods[1], ANSWER)? && pods[1].reaches(&pods[0], ANSWER)?)
                })
            })
            .with_context(|| format!("{mode}, after `{flush}` under a dead daemon"))?;
            let new = keys(1)?;
            ensure!(new.len() >= 2 && new.is_disjoint(&seen), "{mode}: {} keys, some of them old", new.len());
            eventually("the other host to drop what nobody can use", SOON, || Ok(keys(2)?.is_disjoint(&seen)))?;
            seen.extend(new);
        }
        leak.finish(&cluster)?.with_tunnelled(8).context(mode)?;
    }
    Ok(())
}

/// As few as the configuration allows.
const MAX_PACKETS: u32 = 1000;

#[test]
fn a_key_that_has_protected_enough_is_replaced() -> Result<()> {
    kernel::require(&[Part::Esp])?;
    let builder = Cluster::builder().mode(Mode::Ipsec).set("ipsec.maxPackets", MAX_PACKETS);
    let cluster = builder.set("keys.grace", 1).set("keys.hardLifetime", 600).build()?;
    let leak = Leak::watch(&cluster)?;
    cluster.start()?;
    let pods = pods(&cluster)?;
    let first = newest(&cluster, 1)?;
    let load = Load::among(&[&pods[0], &pods[1]], Rate::default())?;
    eventually("two rotations by themselves", SOON, || Ok(newest(&cluster, 1)? >= first + 2))?;
    load.stop()?.exact()?;
    leak.finish(&cluster)?.with_tunnelled(1000).map(drop)
}
