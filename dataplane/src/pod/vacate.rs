//! Deleting a pod's interface without waiting for the kernel to forget it.
//!
//! The request to delete an interface is answered late. First, and within a few milliseconds, the kernel closes both ends,
//! which takes their routes and neighbours away, and takes them out of the lists of their namespaces
//! (`unregister_netdevice_many_notify` in net/core/dev.c). From then on no packet passes, nobody finds the interfaces, their
//! names are free, and nothing can bring them back. What follows, with the lock of the network configuration released, is
//! waiting until nobody can hold a pointer to them (`netdev_run_todo`: `rcu_barrier`) and freeing the memory: some five times
//! as long, and of no interest to who wanted them gone.
//!
//! So one thread makes the request, and another returns as soon as the interface is not found any more. A thread that waits
//! within the kernel cannot be ended, and holds up the end of its process: this is for a daemon that goes on to live, not
//! for a program that would answer by ending. Crashes change nothing: the kernel finishes what it was asked for whatever
//! becomes of who asked, and before it was asked the interface is still there for the next to delete.
//!
//! Who asks a daemon may lose patience, delete the interface without it, and have another made of the same name. A daemon
//! that comes to it only then must not delete that one: so the interface is named by its index too, which the kernel gives
//! to one interface only (`dev_index_reserve` in net/core/dev.c counts up and begins anew after 2³¹).

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use husk_overlay::name::InterfaceName;
use nix::errno::Errno;

use super::{batch, host_interface_index, request};
use crate::error::Error;
use crate::netlink::{Protocol, Socket};

/// How often to look whether the interface is gone.
const POLL: Duration = Duration::from_micros(100);

/// Deletes the host end of a pod that has this index in the calling thread's namespace, and returns as soon as it is gone;
/// false if there was none of this name and index. `busy` is dropped when the kernel has finished, so that who calls can
/// count what is under way.
///
/// # Errors
/// The errors of netlink.
pub fn vacate(host_interface: &InterfaceName, index: u32, busy: impl Send + 'static) -> Result<bool, Error> {
    let is_there = || Ok(host_interface_index(host_interface)? == Some(index));
    if !is_there()? {
        return Ok(false);
    }
    let (sender, receiver) = channel();
    let started = thread::Builder::new().name("detach".to_owned()).spawn({
        let host_interface = host_interface.clone();
        move || {
            let outcome = detach_index(&host_interface, index);
            drop(busy);
            // Whoever asked may have got the answer from the other thread.
            let _ = sender.send(outcome);
        }
    });
    if started.is_err() {
        return detach_index(host_interface, index);
    }
    loop {
        match receiver.recv_timeout(POLL) {
            Ok(outcome) => return outcome,
            Err(RecvTimeoutError::Timeout) if is_there()? => {}
            Err(RecvTimeoutError::Timeout) => return Ok(true),
            Err(RecvTimeoutError::Disconnected) => return detach_index(host_interface, index),
        }
    }
}

/// Deletes the host end of a pod that has this index in the calling thread's namespace, and waits until the kernel has forgotten
/// it; false if there was none of this index. One of the same name that was made since stays.
///
/// # Errors
/// The errors of netlink.
pub fn detach_index(host_interface: &InterfaceName, index: u32) -> Result<bool, Error> {
    let mut socket = Socket::open(Protocol::Route)?;
    match batch(&mut socket, vec![request::delete_index(index, host_interface)]) {
        Ok(()) => Ok(true),
        Err(error) if error.errno() == Some(Errno::ENODEV) => Ok(false),
        Err(error) => Err(error),
    }
}
