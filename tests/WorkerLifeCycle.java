package org.pytorch.serve.wlm;

import org.pytorch.serve.util.ConfigManager;

/** In the place of TorchServe's own class, for StartProbe: a worker is counted, and its process never starts. */
public class WorkerLifeCycle {
    public WorkerLifeCycle(ConfigManager configManager, Model model) {}

    public void startWorker(int port, String deviceIds) throws InterruptedException {
        Thread.sleep(Long.MAX_VALUE);
    }
}
