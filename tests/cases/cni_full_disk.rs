//! Full disks: whatever room is left, ADD is whole or undone and says what it lacked, DEL and GC need none, and the daemon says
//! what it could not write and goes on as soon as it can.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write as _};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use husk_tests::crash::{Victim, bystander, settled, succeeded, tables, valid_error};
use husk_tests::host::LEASE_DIRECTORY;
use husk_tests::{Cluster, CniOutcome, Host, Mode, Signal, eventually};
use nix::mount::{MsFlags, mount};

/// How long the daemon may take to see that there is room, or that there is none: it looks every five seconds.
const LIMIT: Duration = Duration::from_secs(20);

/// Size of a page, in which tmpfs(5) counts on the architectures Husk runs on.
const PAGE: u64 = 4096;
const PAGE_OF_ZEROS: [u8; 4096] = [0; 4096];

/// What the kernel says of a disk that is full.
const FULL: &str = "No space left on device";

const RUN: &str = "/run/husk";
const STATE: &str = "/var/lib/husk";

/// A small file system of a host's own.
struct Disk<'a> {
    host: &'a Host,
    directory: &'static str,
}

impl<'a> Disk<'a> {
    /// Mounts it over a directory, with room for what Husk writes there. It goes with the host's mount namespace.
    fn mount(host: &'a Host, directory: &'static str) -> Result<Self> {
        let options = Some("size=256k,nr_inodes=64,mode=0755");
        host.run(|| mount(Some("tmpfs"), directory, Some("tmpfs"), MsFlags::empty(), options))?
            .with_context(|| format!("mounting a tmpfs on {directory}"))?;
        let disk = Self { host, directory };
        host.run(|| {
            fs::create_dir(disk.files())?;
            File::create(disk.ballast())
        })?
        .context("preparing to fill a disk")?;
        Ok(disk)
    }

    fn ballast(&self) -> PathBuf {
        PathBuf::from(self.directory).join("ballast")
    }

    fn files(&self) -> PathBuf {
        PathBuf::from(self.directory).join("files")
    }

    /// Leaves this many pages.
    fn leave_pages(&self, pages: u64) -> Result<()> {
        self.host.run(|| {
            let mut ballast = OpenOptions::new().append(true).open(self.ballast())?;
            while fits(ballast.write_all(&PAGE_OF_ZEROS))? {}
            let length = ballast.metadata()?.len() / PAGE;
            ensure!(length > pages, "there are no {pages} pages to leave");
            ballast.set_len((length - pages) * PAGE).context("truncating the ballast")
        })?
    }

    /// Leaves this many files that can be made.
    fn leave_files(&self, files: usize) -> Result<()> {
        self.host.run(|| {
            let made = |number: usize| self.files().join(number.to_string());
            let mut number = 0;
            while fits(File::create(made(number)).map(drop))? {
                number += 1;
            }
            ensure!(number >= files, "there are no {files} files to leave");
            (number - files..number).try_for_each(|number| fs::remove_file(made(number))).context("removing files")
        })?
    }

    fn make_room(&self) -> Result<()> {
        self.host
            .run(|| {
                File::create(self.ballast())?;
                fs::remove_dir_all(self.files())?;
                fs::create_dir(self.files())
            })?
            .context("making room")
    }
}

/// False if what was written found no room.
fn fits(written: std::io::Result<()>) -> Result<bool> {
    match written {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::StorageFull => Ok(false),
        Err(error) => Err(error).context("filling a disk"),
    }
}

fn one_host() -> Result<Cluster> {
    let cluster = Cluster::builder().mode(Mode::Direct).hosts(1).build()?;
    cluster.host(1).install_plugin()?;
    Ok(cluster)
}

fn says_full(command: &str, outcome: &CniOutcome) -> Result<()> {
    valid_error(command, outcome)?;
    let said = outcome.json["msg"].as_str().unwrap_or_default();
    let names = said.contains(FULL) && said.contains(LEASE_DIRECTORY);
    ensure!(names && outcome.error_code() == Some(5), "{command} said {}", outcome.stdout);
    Ok(())
}

/// With ever more room, beginning with none, ADD fails until it works; leaves nothing each time, and tells why.
fn with_ever_more_room(disk: &Disk<'_>, victim: &mut Victim<'_>, leave: impl Fn(u64) -> Result<()>) -> Result<()> {
    for room in 0..16 {
        disk.make_room()?;
        leave(room)?;
        let outcome = victim.add()?;
        if outcome.success() {
            victim.attached()?;
            disk.make_room()?;
            ensure!(room > 0, "the disk was not full");
            return victim.delete();
        }
        says_full("ADD", &outcome)?;
        victim.gone().with_context(|| format!("room for {room}"))?;
        victim.delete().context("DEL after an ADD that failed, on a full disk")?;
    }
    bail!("no ADD works, however much room there is")
}

#[test]
fn whatever_room_is_left_an_add_is_whole_or_undone_and_del_and_gc_need_none() -> Result<()> {
    let cluster = one_host()?;
    let host = cluster.host(1);
    let disk = Disk::mount(host, RUN)?;
    host.start_daemon()?;
    host.wait_ready()?;
    let bystander = bystander(host)?;
    let before = tables(host)?;
    let mut victim = Victim::new(host, &bystander, Some(8080))?;

    with_ever_more_room(&disk, &mut victim, |pages| disk.leave_pages(pages)).context("pages")?;
    with_ever_more_room(&disk, &mut victim, |files| disk.leave_files(usize::try_from(files)?)).context("files")?;
    for remove in [Victim::delete, Victim::collect] {
        victim.attach()?;
        disk.leave_pages(0)?;
        disk.leave_files(0)?;
        victim.attached().context("CHECK on a full disk")?;
        remove(&victim).context("on a full disk")?;
        succeeded("CHECK of another pod", &bystander.check()?)?;
        disk.make_room()?;
    }
    settled(host, &bystander, &before)
}

#[test]
fn a_daemon_whose_run_directory_is_full_says_so_until_there_is_room() -> Result<()> {
    let cluster = one_host()?;
    let host = cluster.host(1);
    let disk = Disk::mount(host, RUN)?;
    host.start_daemon()?;
    host.wait_ready()?;
    let mut pod = host.add_pod("before")?;

    // Another MTU is another word to the plugin, which cannot be given.
    for fill in [|disk: &Disk<'_>| disk.leave_pages(0), |disk: &Disk<'_>| disk.leave_files(0)] {
        let logged = host.daemon_log().len();
        fill(&disk)?;
        let mtu = host.netns().mtu("eth0")? - 20;
        host.set_underlay_mtu(mtu)?;
        let log = || host.daemon_log().split_off(logged);
        eventually("the log to say that the disk is full", LIMIT, || {
            Ok(log()
                .lines()
                .any(|line| line.contains("pods have to wait") && line.contains(FULL) && line.contains("node.json")))
        })
        .with_context(log)?;
        // The old word is gone, whose place the new one may have found since; a lease finds none.
        let mut late = host.sandbox("late")?;
        let refused = late.add()?;
        valid_error("ADD", &refused)?;
        let code = refused.error_code().unwrap_or_default();
        ensure!([5, 11].contains(&code) && refused.stdout.contains(FULL), "ADD said {}", refused.stdout);
        succeeded("DEL", &late.del()?)?;

        disk.make_room()?;
        host.wait_ready()?;
        late.add()?.into_result()?;
        ensure!(late.mtu()? == mtu, "a pod has the MTU {} instead of {mtu}", late.mtu()?);
        eventually("the older pod to have the new MTU", LIMIT, || Ok(pod.mtu()? == mtu))?;
        succeeded("DEL", &late.del()?)?;
    }

    // A daemon that starts finds what it needs.
    disk.leave_pages(0)?;
    host.restart_daemon(Signal::SIGKILL)?;
    succeeded("CHECK", &pod.check()?)?;
    succeeded("DEL", &pod.del()?)?;
    disk.make_room()?;
    pod.spec_mut().prev_result = None;
    pod.add()?.into_result()?;
    succeeded("DEL", &pod.del()?)
}

#[test]
fn a_daemon_whose_state_directory_is_full_does_not_start_without_a_word() -> Result<()> {
    let cluster = one_host()?;
    let host = cluster.host(1);
    let disk = Disk::mount(host, STATE)?;
    disk.leave_pages(0)?;
    host.start_daemon()?;
    let mut ended = false;
    eventually("the daemon to say that the disk is full", LIMIT, || {
        ended = host.daemon_status()?.is_some();
        Ok(host.daemon_log().contains(FULL) && host.daemon_log().contains(STATE))
    })
    .with_context(|| host.daemon_log())?;
    disk.make_room()?;
    if ended {
        // What supervises a daemon starts it again; there is nothing left to stop.
        let _ = host.stop_daemon(Signal::SIGKILL);
        host.start_daemon()?;
    }
    host.wait_ready()?;

    // Full later, it costs what a restart would know, and no pod anything.
    disk.leave_pages(0)?;
    let pod = host.add_pod("pod")?;
    succeeded("CHECK", &pod.check()?)?;
    host.restart_daemon(Signal::SIGKILL)?;
    succeeded("CHECK", &pod.check()?)?;
    succeeded("DEL", &pod.del()?)
}
